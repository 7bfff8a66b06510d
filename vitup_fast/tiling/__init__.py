"""Images larger than memory: answers at full resolution, without seams, resumable."""

from .answers import Basis as Basis
from .points import upsample_points as upsample_points
from .read import Reader as Reader
from .read import open_reader as open_reader
from .run import Estimate as Estimate
from .run import Options as Options
from .run import Summary as Summary
from .run import upsample as upsample
