"""Whole multi-turn sessions in Megatron-LM, with the loss an exact mean over turns.

The way of the data; each module imports only modules above it:

     input files
         |  input_files.py files, patterns, folders, gzip, zstd; parquet_records.py: Parquet
         |  shards.py      which part of the input is read
         |  records.py     -> raw records in blocks (record_blocks.py, json_lists.py)
         |  sessions.py    every input format -> Session, every error with file and line
         |                 (chat_formats.py, question_formats.py; entries.py, tool_fields.py)
         |  supervision.py which answers --train-on leaves to be trained on
         v
      Session
         |  templates.py   decides what is a target and which turn it is in; nobody else does
         v
      [Segment]
         |  encoding.py    batched tokenisation -> tokens and one mode a segment
         v
     EncodedBatch
         |  encoding_pool.py   all this in worker processes, in the order of the input
         |  session_writer.py  PREFIX.bin, .idx, .json: Megatron's own indexed dataset + manifest
         |  pipeline.py        reads and writes; journal.py, unfinished.py: goes on after a kill
         |  merge.py           the shards of a run -> what one run would have written
         |  store.py       reads it: memory-mapped, from files or from object storage
         v
    SessionStore
         |  packing.py     session lengths in, PackPlan out: which pieces lie in which row
         v
      PackPlan
         |  samples.py     a plan row -> tokens, labels, loss_mask, loss_token_num, turn_num, ...
         v
     row arrays
         |  dataset.py     MultiTurnDataset: splits, epochs, the cached plan
         |  balance.py     which rows form a batch, for even ranks; row_order.py: of a run
         |  epochs.py      --train-epochs; resume.py: a run goes on with its own rows only
         |  provider.py    --dataset-provider: hands the datasets to Megatron's pretrain
         v
       Batch
         |  batch.py       one broadcast over tensor parallel ranks, a cut over context parallel
         |  attention.py   packed attention: no piece sees another; layer_spec.py puts it in place
         |  loss.py        sum of turn means, integer divisor, the report
         |  moe.py mtp.py  auxiliary losses, at the size that Megatron gives them
         v
     gradients
            forward.py     forward_step, the function that Megatron calls

`python -m megatron_multiturn [SCRIPT.py]` runs all this inside Megatron's own `pretrain`.
`errors`, `modes`, `megatron_compat` and `megatron_hooks` are leaves that any module may import.
Importing this package imports nothing else.
"""

from megatron_multiturn._version import __version__

__all__ = ["__version__"]
