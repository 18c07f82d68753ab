"""Checking a set of samples: one pass over it, what is wrong with it, a page to look at, a clean copy."""

from clipkit.check.clean import pack_clean
from clipkit.check.findings import judge
from clipkit.check.page import summary, write_page
from clipkit.check.scan import scan

__all__ = ["judge", "pack_clean", "scan", "summary", "write_page"]
