"""Facts that only running a library can show: `of_<environment>.py` holds the checks of each, `claims.py` the list.

A check takes a folder for files and returns what stands in the table's cell. It raises where its premise does not hold.
"""
