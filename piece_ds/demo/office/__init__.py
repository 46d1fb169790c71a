"""Three small tasks of an office: a date in words to ISO 8601, an order to JSON, a question to SQL.

They are what the embedded default teaches a real pretrained model. Rows are short, every one has one right answer that
its prompt determines, and the base model has next to none of them right: it knows what the words mean, not what form
the answer has to take.
"""

from piece_ds.demo.office.dates import date_in_words
from piece_ds.demo.office.orders import order_to_json
from piece_ds.demo.office.queries import question_to_sql
from piece_ds.demo.tasks import RowMaker

# In the order of the stream.
OFFICE_TASKS: dict[str, RowMaker] = {
    "dates": date_in_words,
    "orders": order_to_json,
    "queries": question_to_sql,
}

__all__ = ["OFFICE_TASKS"]
