"""One module a command: ``add_arguments(parser)`` and ``run(args)``, which returns the exit code.

The modules import nothing heavy at the top, so that ``fastris --help`` is quick.
"""
