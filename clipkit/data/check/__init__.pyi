from .clean import pack_clean as pack_clean
from .findings import FIGURES as FIGURES
from .findings import judge as judge
from .page import check_summary as check_summary
from .page import write_check_page as write_check_page
from .scanning import FINDING_KINDS as FINDING_KINDS
from .scanning import CheckOptions as CheckOptions
from .scanning import scan as scan
