"""Low-rank adapters on a frozen language model.

`matrices` says where they can be and `targets` where they are, as plain data without torch; `table` how they move to
PEFT's files and back; `layer` and `attach` are the modules.
"""
