"""FastAPI with SQLModel, as its tutorial has it (https://fastapi.tiangolo.com/tutorial/sql-databases/)."""

import os
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import Depends, FastAPI
from sqlalchemy import JSON, Column, event
from sqlmodel import Field, Session, SQLModel, create_engine


class Message(SQLModel, table=True):
    __tablename__ = "messages"
    id: int | None = Field(default=None, primary_key=True)
    received_at: str
    client: str
    key: str | None = None
    body: dict[str, Any] = Field(sa_column=Column(JSON))


engine = create_engine(
    f"sqlite:///{os.environ['BENCH_DATABASE']}", connect_args={"check_same_thread": False, "timeout": 30}
)


@event.listens_for(engine, "connect")
def set_pragmas(connection, record):
    connection.execute("PRAGMA synchronous = FULL")


def get_session():
    with Session(engine) as session:
        yield session


app = FastAPI()


@app.post("/messages", status_code=201)
def create(body: dict[str, Any], session: Annotated[Session, Depends(get_session)]):
    message = Message(received_at=datetime.now(UTC).isoformat(), client="default", body=body)
    session.add(message)
    session.commit()
    session.refresh(message)
    return {"id": message.id}
