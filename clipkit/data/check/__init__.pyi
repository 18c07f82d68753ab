from .clean import pack_clean as pack_clean
from .findings import FIGURES as FIGURES
from .findings import judge as judge
from .page import summary as summary
from .page import write_page as write_page
from .scanning import KINDS as KINDS
from .scanning import scan as scan
