"""One module per command of `muster`: `arguments` declares its options, `execute` runs it, its docstring is its help.

May import everything else in `launcher`. `launcher/__main__.py` imports only the module of the command that is typed.
"""
