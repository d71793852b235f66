"""Examples to fine-tune on: read from a file or the hub, encoded with the trained tokens marked, packed, in batches."""

from lorakit.finetune.data.checking import check_packing
from lorakit.finetune.data.collating import NO_LABEL, collate
from lorakit.finetune.data.encoding import encode, prompt_of
from lorakit.finetune.data.examples import Encoded, Example
from lorakit.finetune.data.packing import Packed, pack
from lorakit.finetune.data.reading import read_rows
from lorakit.finetune.data.report import Report
from lorakit.finetune.data.rows import Row, Rows, split_off
from lorakit.finetune.data.showing import shown, stops_of

__all__ = [
    "NO_LABEL",
    "Encoded",
    "Example",
    "Packed",
    "Report",
    "Row",
    "Rows",
    "check_packing",
    "collate",
    "encode",
    "pack",
    "prompt_of",
    "read_rows",
    "shown",
    "split_off",
    "stops_of",
]
