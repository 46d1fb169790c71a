"""Three small office tasks: a date in words to ISO 8601, an order to JSON, a question to SQL.

The embedded default teaches them to a real pretrained model. Rows are short, and the prompt of each determines its one
right answer. The base model gets almost none of them right: it knows what the words mean, but not which form the answer
must have.
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
