from .packing import PackOptions as PackOptions
from .packing import pack as pack
from .synthetic import COLOURS as COLOURS
from .synthetic import SHAPES as SHAPES
from .synthetic import caption as caption
from .synthetic import draw as draw
from .synthetic import held_out_pairs as held_out_pairs
from .synthetic import random_scene as random_scene
