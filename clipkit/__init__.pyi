from .classification import classify as classify
from .core import ClipkitError as ClipkitError
from .core.version import __version__ as __version__
from .embedding import Embeddings as Embeddings
from .models import load_model as load_model
from .search import Index as Index
