"""looks at a holdout are counted"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "looks",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("look", sa.String(64), nullable=False),
        sa.Column("example", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("seq"),
    )
    op.create_index("ix_looks_look", "looks", ["look"])
    op.create_index("ix_looks_example", "looks", ["example"])


def downgrade() -> None:
    op.drop_table("looks")
