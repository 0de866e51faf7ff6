"""Other projects' ConvLSTMs by their own names: same constructor, call, results and state_dict keys.

One module per project, none imported before it is asked for: ``ndrplz``, ``automan000``, ``openstl``, ``keras``.
"""
