"""How heavy are the tails of these values? Tukey's box statistics and a tail index, exact or streamed.

``box_statistics`` is exact and reads its input in place (``chunked``, where ``guess`` says where to look);
``TailStream`` holds what cannot be held. ``boxes`` has the record both fill and its arithmetic; ``advice``, imported by
name since it brings scipy.stats, says which distance and c suit measured residuals.
"""

from robustcm.tails.boxes import BoxStatistics, TailShape, tail_count, tail_shape
from robustcm.tails.exact import box_statistics, box_statistics_along, box_statistics_by
from robustcm.tails.stream import TailStream

__all__ = [
    "BoxStatistics",
    "TailShape",
    "TailStream",
    "box_statistics",
    "box_statistics_along",
    "box_statistics_by",
    "tail_count",
    "tail_shape",
]
