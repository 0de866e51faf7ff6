"""When a stage ends."""

from __future__ import annotations

from fastris.training import Curriculum, TrainConfig

CONFIG = TrainConfig(max_steps=100, patience=2, stage_limit=(0.5, 1.0))


def run(curriculum: Curriculum, losses: dict[int, float]) -> list[int]:
    """The stage after each validation."""
    stages = []
    for step, loss in losses.items():
        curriculum.update(loss)
        curriculum.advance(step)
        stages.append(curriculum.index)
    return stages


def test_a_stage_ends_when_the_loss_stops_improving():
    assert run(Curriculum(CONFIG), {10: 1.0, 20: 0.9, 30: 0.95, 40: 0.9}) == [0, 0, 0, 1]


def test_an_improving_stage_ends_at_its_share_of_the_steps():
    assert run(Curriculum(CONFIG), {10: 1.0, 30: 0.9, 49: 0.8, 50: 0.7}) == [0, 0, 0, 1]


def test_the_last_stage_does_not_end():
    curriculum = Curriculum(CONFIG)
    run(curriculum, {50: 1.0})
    assert curriculum.stage.instances == 20
    assert run(curriculum, {60: 1.0, 70: 1.0, 80: 1.0, 90: 1.0, 100: 1.0}) == [1] * 5


def test_a_new_stage_starts_with_its_own_best():
    curriculum = Curriculum(CONFIG)
    run(curriculum, {50: 0.1})
    assert curriculum.update(5.0) and not curriculum.update(6.0)


def test_a_little_better_is_a_plateau():
    losses = {10: -1.0, 20: -1.005, 30: -1.009}
    assert run(Curriculum(CONFIG.updated({"plateau": 0.02})), losses) == [0, 0, 1]
    assert run(Curriculum(CONFIG.updated({"plateau": 0.001})), losses) == [0, 0, 0]
    slow = {10: 1.0, 20: 0.99, 30: 0.97, 40: 0.96, 45: 0.94}  # little by little adds up
    assert run(Curriculum(CONFIG.updated({"plateau": 0.02})), slow) == [0] * 5


def test_the_lowest_loss_is_kept_though_it_be_a_plateau():
    curriculum = Curriculum(CONFIG.updated({"plateau": 0.5}))
    assert [curriculum.update(loss) for loss in (1.0, 0.9, 0.95, 0.8)] == [True, True, False, True]
    assert (curriculum.best, curriculum.level, curriculum.stale) == (0.8, 1.0, 3)


GROWING = TrainConfig(
    max_steps=1000, patience=1, instances=(2, 4, 0), growth=3, crop=(64, 64, 64), batch_size=(1, 1, 1),
    stage_limit=(1.0, 1.0, 1.0),
)  # fmt: skip


def instances(curriculum: Curriculum, losses: dict[int, float]) -> list[int]:
    """The most instances after each validation."""
    seen = []
    for step, loss in losses.items():
        curriculum.update(loss)
        curriculum.advance(step)
        seen.append(curriculum.stage.instances)
    return seen


def test_two_instances_then_more_at_each_plateau_then_all():
    curriculum = Curriculum(GROWING, most=11)
    flat = {step: 1.0 for step in range(10, 150, 10)}  # the second validation at each number is a plateau
    assert instances(curriculum, flat) == [2, 4, 4, 7, 7, 10, 10, 0, 0, 0, 0, 0, 0, 0]
    assert curriculum.index == 2


def test_it_grows_only_at_plateaus():
    falling = {10: 1.0, 20: 1.0, 30: 1.0, 40: 0.9, 50: 0.8, 60: 0.8}
    assert instances(Curriculum(GROWING, most=30), falling) == [2, 4, 4, 4, 4, 7]


def test_a_growing_stage_ends_where_the_next_begins():
    config = GROWING.updated({"instances": (2, 4, 8)})
    assert instances(Curriculum(config), {step: 1.0 for step in range(10, 80, 10)}) == [2, 4, 4, 7, 7, 8, 8]


def test_a_growing_stage_that_has_used_its_steps_grows_no_more():
    config = GROWING.updated({"stage_limit": (0.01, 0.02, 1.0)})
    assert instances(Curriculum(config, most=30), {10: 1.0, 20: 1.0}) == [4, 0]


def test_the_last_step_ends_no_stage():
    """So that a run can go on with more steps where it was."""
    assert instances(Curriculum(GROWING, most=30), {1000: 1.0}) == [2]


def test_its_state_can_be_taken_up_while_it_grows():
    import json

    first, second = Curriculum(GROWING, most=30), Curriculum(GROWING, most=30)
    instances(first, {10: 1.0, 20: 1.0, 30: 1.0, 40: 1.0, 50: 2.0})
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.stage == first.stage and second.stage.instances == 7
    assert (second.best, second.level, second.stale) == (2.0, 2.0, 0)
    second.load_state_dict({"index": 1, "best": 0.5, "stale": 2})  # as written before there was growth
    assert (second.grown, second.level) == (0, 0.5)


def test_its_state_can_be_taken_up():
    first, second = Curriculum(CONFIG), Curriculum(CONFIG)
    run(first, {50: 1.0, 60: 0.5, 70: 0.6})
    second.load_state_dict(first.state_dict())
    assert (second.index, second.best, second.stale) == (1, 0.5, 1)
    second.load_state_dict(Curriculum(CONFIG).state_dict())
    assert second.update(1e9)
