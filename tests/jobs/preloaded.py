"""Imported once by the process that ranks are forked from: importing all of this takes longer than most tests of ranks."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed guesses, and says so

import deepspeed  # noqa: F401
import peft  # noqa: F401
import torch.distributed.checkpoint
import torch.distributed.fsdp  # noqa: F401
from transformers.models.llama import modeling_llama  # noqa: F401
from transformers.models.mixtral import modeling_mixtral  # noqa: F401
