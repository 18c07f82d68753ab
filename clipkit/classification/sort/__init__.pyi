from .sorter import Sorter as Sorter
from .sorter import undo_sort as undo_sort
