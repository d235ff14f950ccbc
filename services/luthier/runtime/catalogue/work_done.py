"""What tasks bring and what callers are given: checkpoints, rows, answers."""

from luthier.runtime.metric import Metric, Service

_STAGES = ("stage",)
_DATA: tuple[Service, ...] = ("data",)
_ANSWERS: tuple[Service, ...] = ("evaluation",)

CHECKPOINT_SECONDS = Metric(
    name="luthier_checkpoint_seconds",
    kind="histogram",
    help="Time from the beginning of a checkpoint's copy to its commit, as its worker saw it.",
    question="Do checkpoints take too long?",
    labels=("kind",),
    unit="seconds",
    buckets=(0.1, 0.5, 1, 5, 15, 60, 300),
    services=("training", "evaluation"),
    bound="10 a kind of task",
)
CHECKPOINT_BYTES = Metric(
    name="luthier_checkpoint_bytes",
    kind="histogram",
    help="Sizes of checkpoints.",
    question="How large are checkpoints?",
    labels=("kind",),
    unit="bytes",
    buckets=(1 << 16, 1 << 20, 16 << 20, 256 << 20, 1 << 30, 16 << 30),
    services=("training", "evaluation"),
    bound="9 a kind of task",
)
ROWS = Metric(
    name="luthier_data_rows_total",
    kind="counter",
    help="Records that were built into versions, and rendered.",
    question="How fast is data prepared?",
    labels=_STAGES,
    unit="rows",
    services=_DATA,
    bound="two",
)
SOURCE_BYTES = Metric(
    name="luthier_data_source_bytes_total",
    kind="counter",
    help="Bytes of files that were read into versions.",
    question="How fast are files read?",
    unit="bytes",
    services=_DATA,
)
BAD_RECORDS = Metric(
    name="luthier_data_bad_records_total",
    kind="counter",
    help="Records that could not be read or rendered, by reason; of one version or rendering the first 1,000.",
    question="What is wrong with the data?",
    labels=("stage", "reason"),
    services=_DATA,
    bound="one a stage and reason that was met; reasons that are none of ours are OTHER",
)
GENERATIONS_WAITING = Metric(
    name="luthier_generations_waiting",
    kind="gauge",
    help="Calls of GenerateText that wait for a worker's slot.",
    question="Are there enough workers for callers?",
    services=_ANSWERS,
)
GENERATIONS_RUNNING = Metric(
    name="luthier_generations_running",
    kind="gauge",
    help="Calls of GenerateText that a worker answers.",
    question="How many are answered at a time?",
    services=_ANSWERS,
)
GENERATIONS = Metric(
    name="luthier_generations_total",
    kind="counter",
    help="Calls of GenerateText by how they ended: a finish reason, the reason of an error, or GONE.",
    question="Are answers whole, cut or failed?",
    labels=("finish_reason",),
    services=_ANSWERS,
    bound="one a finish reason and reason that was met; reasons that are none of ours are OTHER",
)
FIRST_TOKEN = Metric(
    name="luthier_generation_first_token_seconds",
    kind="histogram",
    help="Time from the call to the first piece of text.",
    question="How long do callers wait for an answer to begin?",
    unit="seconds",
    buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 15, 60),
    services=_ANSWERS,
    bound="12",
)
TOKEN_SECONDS = Metric(
    name="luthier_generation_token_seconds",
    kind="histogram",
    help="Time by token after the first piece of text, the mean of an answer.",
    question="How fast does an answer come?",
    unit="seconds",
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1),
    services=_ANSWERS,
    bound="11",
)
PROMPT_TOKENS = Metric(
    name="luthier_generation_prompt_tokens_total",
    kind="counter",
    help="Tokens of prompts that were answered.",
    question="How much is read?",
    unit="tokens",
    services=_ANSWERS,
)
ANSWER_TOKENS = Metric(
    name="luthier_generation_answer_tokens_total",
    kind="counter",
    help="Tokens of answers, as they come.",
    question="How many tokens a second come out?",
    unit="tokens",
    services=_ANSWERS,
)
