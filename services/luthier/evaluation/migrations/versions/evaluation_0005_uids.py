"""Key tasks and events by uid; say of evaluations what they were made from, and what they still need."""

from luthier.storage.uid_rows import key_by_uid, messages, need_elsewhere, write
from luthier.stored.v1.evaluation_pb2 import EvaluationPrivate
from luthier.v1.evaluation_pb2 import Evaluation

revision = "evaluation_0005"
down_revision = "evaluation_0004"
branch_labels = None
depends_on = ("work_0005",)

_UNFINISHED = (Evaluation.STATE_QUEUED, Evaluation.STATE_RUNNING, Evaluation.STATE_CANCELLING)


def upgrade() -> None:
    """Change every row."""
    key_by_uid("evaluations")
    _say_of_evaluations()


def downgrade() -> None:
    """Refuse: names that were used again since cannot be keys."""
    raise NotImplementedError("rows by uid cannot become rows by name again; restore a backup")


def _say_of_evaluations() -> None:
    for evaluation, _ in messages("evaluations", (Evaluation, EvaluationPrivate)):
        evaluation.references.add(name=evaluation.dataset_version, digest=evaluation.dataset_digest)
        for name in sorted(evaluation.model_digests):
            evaluation.references.add(name=name, digest=evaluation.model_digests[name])
        if evaluation.state in _UNFINISHED:
            names = [reference.name for reference in evaluation.references]
            need_elsewhere(names, evaluation.uid, evaluation.name)
        write("evaluations", evaluation)
