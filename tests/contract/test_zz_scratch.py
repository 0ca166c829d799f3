"""scratch"""
from __future__ import annotations
from datetime import UTC, datetime
from sqlalchemy import text, func, event
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncEngine
from mlplat.db.tables import registered_model, pipeline_run, run, experiment
from mlplat.tracking.experiments import ExperimentStore
from mlplat.tracking.runs import RunStore
async def test_a(engine: AsyncEngine) -> None:
    @event.listens_for(engine.sync_engine, "after_cursor_execute")
    def x(conn, cursor, statement, parameters, context, executemany):
        if "INSERT" in statement: print("  RAW", cursor.rowcount, context.execute_style, statement[:150].replace("\n"," "), statement[-60:])
    s = ExperimentStore(engine, "mlflow-artifacts:"); await s.ensure_default()
    r = RunStore(engine)
    for i in range(4):
        b = await r.create("r1", 0, f"two{i}", "", datetime.now(UTC), {"b":"2"})
        print(i, b.name)
    async with engine.begin() as c:
        for i in range(3):
            q = await c.execute(insert(registered_model).values(name="a", created_at=func.now(), updated_at=func.now()).on_conflict_do_nothing())
            print("rowcount", q.rowcount, q.context.rowcount, q.cursor)
