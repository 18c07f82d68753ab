"""The two sides of a model, images and texts, as every room names them."""

from typing import Literal

__all__ = ["SIDES", "Side"]

Side = Literal["image", "text"]
SIDES: tuple[Side, ...] = ("image", "text")
