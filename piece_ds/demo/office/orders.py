"""A sentence that orders something, to JSON: customer, item, quantity, city, in this order, as json.dumps writes it."""

import json
from random import Random

from piece_ds.demo.office.dates import cardinal
from piece_ds.demo.office.words import CITIES, COLOURS, FIRST_NAMES, GOODS, LAST_NAMES
from piece_ds.demo.tasks import Row

# {n} is the quantity, {g} the goods, {w} the customer, {c} the city.
_SENTENCES = (
    "{w} from {c} orders {n} {g}.",
    "Please send {n} {g} to {w} in {c}.",
    "{w} in {c} would like {n} {g}.",
    "Ship {n} {g} to {c}, attention {w}.",
    "We need {n} {g} in {c} by Monday. {w}",
    "Hello, this is {w}. Can I get {n} {g} delivered to {c}?",
    "{n} {g} for {w}, {c}, as soon as possible.",
    "A call from {c}: {w} wants {n} {g}.",
    "To {c}, please: {n} {g}. Thanks, {w}",
    "{w} asks for {n} {g}; the address is in {c}.",
    "Could you bring {n} {g} to our shop in {c}? Regards, {w}",
    "Reserve {n} {g} for {w}, who will collect them in {c}.",
    "I am {w} and I am buying {n} {g} for my office in {c}.",
    "Our branch in {c} is out of {g}: {n} more, please. {w}",
    "New order, {n} {g}, customer {w}, city {c}.",
    "Dear team, {w} of {c} has just paid for {n} {g}.",
    "Last time it was pens, now {w} takes {n} {g} to {c}.",
    "Put {w} down for {n} {g}, and deliver in {c}.",
)
_QUANTITIES = (*range(2, 21), 24, 25, 30, 36, 40, 45, 50, 60, 64, 72, 75, 80, 90, 96, 100, 120, 144, 150, 200, 250, 500)
SAID_UP_TO = 20  # quantities up to this may be in words


def order_to_json(random: Random) -> Row:
    """Return a row with an order of one kind of goods by one customer."""
    quantity = random.choice(_QUANTITIES)
    in_words = quantity <= SAID_UP_TO and random.random() < 0.5
    goods = f"{random.choice(COLOURS)} {random.choice(GOODS)}" if random.random() < 0.7 else random.choice(GOODS)
    who = f"{random.choice(FIRST_NAMES)} {random.choice(LAST_NAMES)}"
    city = random.choice(CITIES)
    said = cardinal(quantity) if in_words else str(quantity)
    sentence = random.choice(_SENTENCES).format(n=said, g=goods, w=who, c=city)
    answer = {"customer": who, "item": goods, "quantity": quantity, "city": city}
    return {"prompt": f"{sentence[0].upper()}{sentence[1:]}\nJSON:", "answer": json.dumps(answer)}
