"""Matplotlib, which would read a file `matplotlibrc` of the current folder when it is imported: it is imported elsewhere.

The current folder may be a stranger's model folder. What the user has set up in their own configuration folder counts as ever.
"""

from __future__ import annotations

import contextlib

from gemma_edge.children import own_place

with own_place() as _place, contextlib.chdir(_place.cwd):
    import matplotlib as matplotlib

from matplotlib.axes import Axes as Axes
from matplotlib.figure import Figure as Figure
from matplotlib.ticker import LogLocator as LogLocator
from matplotlib.ticker import MaxNLocator as MaxNLocator
from matplotlib.ticker import NullLocator as NullLocator
from matplotlib.ticker import StrMethodFormatter as StrMethodFormatter
