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


def test_its_state_can_be_taken_up():
    first, second = Curriculum(CONFIG), Curriculum(CONFIG)
    run(first, {50: 1.0, 60: 0.5, 70: 0.6})
    second.load_state_dict(first.state_dict())
    assert (second.index, second.best, second.stale) == (1, 0.5, 1)
    second.load_state_dict(Curriculum(CONFIG).state_dict())
    assert second.update(1e9)
