"""The table of events.

It grants nothing: provisioning gives the application's role its rights through default privileges.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from inbox.events import Xid8

revision: str = "0001"
down_revision: str | None = None
branch_labels: None = None
depends_on: None = None
# There is no release before it.
backward_compatible: bool = True


def upgrade() -> None:
    op.create_table(
        "event",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("xid", Xid8(), server_default=sa.text("pg_current_xact_id()"), nullable=False),
        sa.Column("idempotency_key", sa.Text(), nullable=False),
        sa.Column("fingerprint", sa.LargeBinary(), nullable=False),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("payload", postgresql.JSONB(), nullable=False),
        sa.Column("size", sa.Integer(), nullable=False),
        sa.Column("received_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("idempotency_key", name="event_idempotency_key_key"),
    )
    op.create_index("event_xid_id_idx", "event", ["xid", "id"])


def downgrade() -> None:
    op.drop_table("event")
