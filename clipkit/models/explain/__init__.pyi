from .heatmap import ExplainOptions as ExplainOptions
from .heatmap import check_texts as check_texts
from .heatmap import explain as explain
