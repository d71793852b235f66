"""Why a case falls short of its aim: scenario → pattern of the case (as in fnmatch) → the reason.

The page of results prints it under the table. A scenario of a GPU is "layer on cuda".
"""

REASONS: dict[str, dict[str, str]] = {}
