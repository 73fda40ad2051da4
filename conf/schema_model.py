"""Defines the keys of `model` and `data`. `conf.schema` puts all sections together."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from conf.choices import Attention, Format, Init, Mask, Order, Overlong, Role, TrainOnEnd
from conf.schema_fields import SEEDS, at_least, entries, free_text


@dataclass
class Architecture:
    """The fields of a Hugging Face config.json that define a model's shape: enough to build it and to estimate its memory."""

    model_type: str = MISSING
    """Name of the model family in transformers, for example `llama` or `qwen2`."""
    vocab_size: int = at_least(1)
    """Tokens of the vocabulary: rows of the embedding and of the output head."""
    hidden_size: int = at_least(1)
    intermediate_size: int = at_least(1)
    """Width of the MLP in each block."""
    num_hidden_layers: int = at_least(1)
    """Number of decoder blocks."""
    num_attention_heads: int = at_least(1)
    num_key_value_heads: int = at_least(1)
    max_position_embeddings: int = at_least(1)
    """Longest sequence that the model was made for, in tokens."""
    tie_word_embeddings: bool = False
    """Whether the output head uses the weights of the embedding."""
    tower_gib: float = at_least(0, 0.0)
    """GiB of the weights that a multimodal model has beside its text. They are not loaded; a merge copies them."""
    extra: dict[str, Any] = free_text(factory=dict)
    """Any other fields of config.json, passed on unchanged (rope parameters, head_dim, biases)."""


@dataclass
class Model:
    name: str = MISSING
    """Short name, used in the name of the run."""
    source: str = MISSING
    """Hub id or folder with the weights, the config and the tokenizer."""
    revision: str | None = None
    """Commit, tag or branch on the Hub. Set a commit if the run must be repeatable."""
    tokenizer: str | None = None
    """Hub id or folder of a tokenizer to use instead of the one in `source`."""
    init: Init = Init.pretrained
    """`pretrained`: read the weights from `source`. `random`: build `architecture` with new weights (demo, benchmarks)."""
    ignore_tensors: list[str] = field(default_factory=list)
    """Regular expressions for names of stored tensors that training does not need, such as layers that predict several tokens
    (`["^mtp[.]"]`). They are not loaded, and a merge copies them from `source` as they are."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off, because that code runs with your permissions."""
    attention: Attention = Attention.auto
    """Attention kernel. `auto`: the fastest kernel of torch that model, GPU and `data.packing` allow; the log names it. That
    is `cudnn` for rows of one sample on Hopper and later, and `varlen` for packed rows. `flash_attention_*` need their package."""
    architecture: Architecture | None = None
    """Shape of the model, for checks and memory estimates before anything is queued. Null: read from config.json, if it is on this
    machine. `init: random` needs it."""


@dataclass
class DataSet:
    """One of several sets of training rows, as in `data.sets.NAME.path=...`."""

    path: str = MISSING
    """Like `data.path`."""
    subset: str | None = None
    """Like `data.subset`."""
    revision: str | None = None
    """Like `data.revision`."""
    files: list[str] = field(default_factory=list)
    """Like `data.files`."""
    split: str | None = None
    """Like `data.split`."""
    format: Format | None = None
    """Like `data.format`. Null: the value of `data.format`."""
    fields: dict[str, str] = free_text(factory=dict)
    """Like `data.fields`. Empty: the value of `data.fields`."""
    roles: dict[str, str] = free_text(factory=dict)
    """Like `data.roles`. Empty: the value of `data.roles`."""
    ignore: list[str] = free_text(factory=list)
    """Like `data.ignore`. Empty: the value of `data.ignore`."""
    weight: float = at_least(0.0001, 1.0)
    """How often each row is used in an epoch. 2: twice. 0.5: a random half of the rows, chosen by `data.seed`."""
    num_samples: int | None = at_least(1, None, at_most=1e9)
    """Rows of this set per epoch, used instead of `weight`: a random subset, or the set repeated as often as needed."""


@dataclass
class Gates:
    """Limits on bad rows. Each is a share of all rows, from 0 to 1. Preprocess stops if more rows than that are bad.

    Below its limit, bad rows are counted and shown, and preprocess continues. Rows that cannot be used are then left out.
    1 never stops.
    """

    unreadable: float = at_least(0, 0.0, at_most=1)
    """Lines that are not JSON, not UTF-8, or not an object with named columns."""
    unusable: float = at_least(0, 0.0, at_most=1)
    """Rows that do not match the format: a column is missing or null, a text is not a string, or the chat template raises an
    error for the turns."""
    roles: float = at_least(0, 0.0, at_most=1)
    """Rows with an unknown speaker. `data.roles` maps names of speakers."""
    empty: float = at_least(0, 0.0, at_most=1)
    """Rows with an empty question or answer."""
    unwritten: float = at_least(0, 0.0, at_most=1)
    """Rows with tools, documents or names that the chat template does not write. A row with a text, a thought or a call that it
    does not write is `unusable`."""
    overlong: float = at_least(0, 0.2, at_most=1)
    """Rows longer than `data.max_length` that are truncated or dropped. With `data.overlong=split` nothing is lost, so this
    limit does not apply."""
    untrained: float = at_least(0, 0.05, at_most=1)
    """Rows without a trained token, for example because the answer was cut off. They are left out."""
    endless: float = at_least(0, 0.05, at_most=1)
    """Rows that were not truncated, but whose last trained token does not end a turn or the text. A model that never sees an
    end token never stops generating."""
    placeholders: float = at_least(0, 0.02, at_most=1)
    """Rows with an unfilled template placeholder, for example {instruction} or {{ name }}."""
    vocabulary: float = at_least(0, 0.0, at_most=1)
    """Rows of token ids (`data.format=tokenised`) with an id that the tokenizer does not have. They are left out."""
    duplicates: float = at_least(0, 0.2, at_most=1)
    """Training rows with the same tokens as an earlier row. `data.drop_duplicates` removes them."""
    overlap: float = at_least(0, 0.01, at_most=1)
    """Validation rows that are also training rows. Their loss says little."""


@dataclass
class Data:
    name: str = MISSING
    """Short name, used in the name of the run."""
    path: str | None = MISSING
    """Training rows: a file (JSON, JSONL, Parquet, Arrow, CSV, TSV, text; also .gz, .bz2, .xz, .zst), a folder or glob pattern of
    such files, an address (https, hf, s3, gs), or a Hub id: `owner/name` or `owner/name:train[:100]`."""
    subset: str | None = None
    """Subset of a Hub data set, also called its config name. With LLaMA-Factory's `dataset_info.json` as path: the set's name."""
    revision: str | None = None
    """Commit, tag or branch of a Hub data set. Set a commit if the run must be repeatable."""
    files: list[str] = field(default_factory=list)
    """Files to read in a Hub data set or a folder, as glob patterns. Empty: all that belong to the split."""
    split: str | None = None
    """Range of rows to use, in the notation of Python and the Hub: `[:1000]`, `[10%:]`, `[-100:]`."""
    sets: dict[str, Any] = entries(DataSet)
    """Several training sets instead of `path`. Each has a name, a path and a weight."""
    format: Format = Format.auto
    """Format of the rows. `auto` recognizes it from the columns and logs which one it is."""
    fields: dict[str, str] = free_text(factory=dict)
    """Maps columns with other names: the format's column to your column, or to a Jinja template of the row
    ("{{ title }}: {{ body }}"). `role`, `content` and the other keys of a message map in the same way. "name?": rows may lack
    it."""
    roles: dict[str, str] = free_text(factory=dict)
    """Maps speakers with other names: your name to system, user, assistant or tool."""
    ignore: list[str] = free_text(factory=list)
    """Columns, and keys of messages, to read as if the rows did not have them."""
    split_thinking: bool = False
    """Take `<think>...</think>` out of the answers, and give it to the chat template as the thought (`reasoning_content`)."""
    chat_template: str | None = None
    """chatml, gemma, llama3, mistral, qwen, or the path of a Jinja file. Null: the tokenizer's own. It is saved with the
    consolidated model."""
    template_kwargs: dict[str, Any] = free_text(factory=dict)
    """Values for variables of the chat template, for example `{enable_thinking: false}`. A row's own `chat_template_kwargs` win."""
    mask: Mask = Mask.assistant
    """Which part of a chat is trained. `assistant`: every turn of the roles in `train_on`. `last`: the last of these turns.
    `all`: everything. If a turn has a `train` field, its value is used instead."""
    train_on: list[Role] = field(default_factory=lambda: [Role.assistant])
    """Roles whose turns are trained."""
    train_on_end: TrainOnEnd = TrainOnEnd.turn
    """Which tokens that end a turn are trained. `turn`: those of trained turns. `all`: those of every turn. `last`: the last one
    of the chat. `none`: none of them."""
    end_of_turn: list[str] = free_text(factory=list)
    """Tokens that end a turn of this chat template. Empty: those of the known model families and the end-of-text token."""
    eos_token: str | None = free_text(None)
    """Token that ends a text, and at which generation stops. Null: the tokenizer's own."""
    pad_token: str | None = free_text(None)
    """Token that pads rows. Null: the tokenizer's own, or its end-of-text token if it has none."""
    special_tokens: list[str] = free_text(factory=list)
    """Additional tokens that are never split, for example `<|im_start|>`. The embedding grows if the model has no rows for
    them."""
    validation_path: str | None = None
    """Validation rows, written as in `path`. Null: `validation_fraction` of the training rows."""
    validation_split: str | None = None
    """Range of rows of `validation_path`, written as in `split`. It may be a range of the training file."""
    validation_fraction: float = at_least(0, 0.05, at_most=0.5)
    """Share of the rows that is used for validation if there is no `validation_path`. At least one row is held out; 0 holds
    out nothing, and there is then no held-out loss. Rows are chosen by their content and
    `seed`: equal rows are never in both parts. If rows are added to the file, the others stay where they are."""
    max_length: int = at_least(2, 2048, at_most=100_000_000)
    """Longest row, in tokens."""
    overlong: Overlong = Overlong.truncate
    """What to do with a sample longer than `max_length`. `truncate`: cut it. `split`: continue it in further samples. `drop`:
    leave it out. `error`: stop. All cases are counted."""
    packing: bool = False
    """Put several samples into each row of `max_length` tokens. Attention stays inside each sample. `train.global_batch` then
    counts full rows."""
    order: Order = Order.auto
    """Order of the rows in an epoch. `balanced`: random, but all rows of a step take about the same time, so that ranks do not
    wait for each other. `random`: no balancing. `length`: random, but neighboring steps have rows of similar length, which
    need less padding (a Trainer's `group_by_length`). `file`: the order of the input, for a curriculum. `auto`: `balanced` for
    packed rows, else `random`, because a step of only short samples would give their tokens more weight."""
    pad_to_max: bool = False
    """Pad every training row to `max_length`, so that all steps need the same memory."""
    drop_duplicates: bool = False
    """Keep only the first of training rows with the same tokens."""
    max_rows: int | None = at_least(1, None)
    """Use only this many rows from the start of each set, for a quick look at the data. Null: all rows."""
    preview: int = at_least(0, 1)
    """Samples to show in the log as the model sees them. RUN/data/preview.html and preview.jsonl have more."""
    workers: int | None = at_least(1, None)
    """Processes that tokenize. Null: one for each CPU core of the preprocess job (`cluster.cpu.cpus_per_rank`)."""
    cache: str | None = None
    """Folder for tokenized sets. Runs share them; they are named by a hash of their content. Null: `.data` next to the
    run folder. `$NAME` is expanded on the node."""
    seed: int = at_least(0, 0, at_most=SEEDS)
    """Seed for the choice of validation rows, for subsets of sets, and for the order of training rows."""
    gates: Gates = field(default_factory=Gates)
