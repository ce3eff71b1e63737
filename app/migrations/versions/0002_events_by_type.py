"""The index that pages of one type are read from.

Built while events are written: a failure leaves an invalid index, which nothing reads and every write pays for.
"""

from alembic import op

INDEX = "event_type_xid_id_idx"

revision: str = "0002"
down_revision: str | None = "0001"
branch_labels: None = None
depends_on: None = None
# The release before it does not know the index, and loses nothing.
backward_compatible: bool = True
repair: str = "DROP INDEX CONCURRENTLY IF EXISTS event_type_xid_id_idx"


def upgrade() -> None:
    with op.get_context().autocommit_block():
        # It waits for the transactions that run, however long, and lets every query pass meanwhile.
        op.execute("SET lock_timeout = 0")
        # What an earlier attempt left: it works again without help.
        op.execute(repair)
        op.create_index(INDEX, "event", ["type", "xid", "id"], postgresql_concurrently=True)
        op.execute("RESET lock_timeout")


def downgrade() -> None:
    with op.get_context().autocommit_block():
        op.execute("SET lock_timeout = 0")
        op.execute(repair)
        op.execute("RESET lock_timeout")
