"""Key tasks and events by uid; say of versions and renderings what they were made from, and what they still need."""

from luthier.storage.uid_rows import hold, key_by_uid, messages, need_elsewhere, uids, write
from luthier.stored.v1.data_pb2 import DatasetVersionPrivate, RenderingPrivate
from luthier.v1.dataset_pb2 import DatasetVersion
from luthier.v1.rendering_pb2 import Rendering

revision = "data_0005"
down_revision = "data_0004"
branch_labels = None
depends_on = ("work_0005",)

_UNFINISHED_VERSIONS = (
    DatasetVersion.STATE_QUEUED,
    DatasetVersion.STATE_BUILDING,
    DatasetVersion.STATE_CANCELLING,
)
_UNFINISHED_RENDERINGS = (
    Rendering.STATE_QUEUED,
    Rendering.STATE_RENDERING,
    Rendering.STATE_CANCELLING,
)


def upgrade() -> None:
    """Change every row."""
    key_by_uid("dataset_versions", "renderings")
    _say_of_versions()
    _say_of_renderings()


def downgrade() -> None:
    """Refuse: names that were used again since cannot be keys."""
    raise NotImplementedError("rows by uid cannot become rows by name again; restore a backup")


def _say_of_versions() -> None:
    datasets, uploads = uids("datasets"), uids("uploads")
    for version, private in messages("dataset_versions", (DatasetVersion, DatasetVersionPrivate)):
        dataset = version.name.rpartition("/versions/")[0]
        version.references.add(name=dataset, uid=datasets.get(dataset, ""))
        hold(datasets.get(dataset, ""), version.uid, version.name, lasting=True)
        for source, file in zip(version.sources, private.source_files, strict=True):
            uid = uploads.get(source.upload, "")
            version.references.add(name=source.upload, uid=uid, digest=file.sha256)
            if version.state in _UNFINISHED_VERSIONS:
                hold(uid, version.uid, version.name, lasting=False)
        write("dataset_versions", version)


def _say_of_renderings() -> None:
    of_versions = messages("dataset_versions", (DatasetVersion, DatasetVersionPrivate))
    versions = {version.name: (version.uid, version.digest) for version, _ in of_versions}
    for rendering, private in messages("renderings", (Rendering, RenderingPrivate)):
        uid, digest = versions.get(rendering.dataset_version, ("", ""))
        rendering.references.add(name=rendering.dataset_version, uid=uid, digest=digest)
        rendering.references.add(name=rendering.model, digest=private.model_digest)
        if rendering.state in _UNFINISHED_RENDERINGS:
            hold(uid, rendering.uid, rendering.name, lasting=False)
            need_elsewhere([rendering.model], rendering.uid, rendering.name)
        write("renderings", rendering)
