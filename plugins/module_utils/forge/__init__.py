"""What the control side works out before a host is touched: checks of the inventory, sizes, budgets, files to release.

Python 3.9 suffices for `source_files`, which the `source_archive` module also runs; the rest needs the control
machine's 3.11.
"""
