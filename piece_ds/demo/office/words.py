"""The vocabulary that the office tasks share: names, places, goods."""


def words(text: str) -> tuple[str, ...]:
    """Return the words of text, separated by white space."""
    return tuple(text.split())


FIRST_NAMES = words(
    "Adam Alice Amir Anna Boris Carla Chen Clara Daniel Diana Elena Emil Eva Farid Felix Grace Hanna Hugo Ida "
    "Ivan Jack Jana Karim Karl Laura Leo Lina Lucas Maria Marta Max Mira Nadia Nina Noah Olga Omar Oscar Paul "
    "Petra Rosa Samir Sara Simon Sofia Tom Vera Victor Yara Zoe"
)
LAST_NAMES = words(
    "Adams Bauer Becker Bell Berg Black Brown Carter Chan Clark Cole Costa Davis Diaz Evans Fischer Ford Garcia "
    "Gray Hall Hansen Hill Jensen Jones Keller Khan King Klein Lang Larsen Lee Lopez Marino Martin Meyer Moore "
    "Nolan Novak Olsen Park Patel Perez Reed Rossi Silva Smith Stone Suzuki Wagner Young"
)
CITIES = words(
    "Athens Austin Basel Bergen Berlin Boston Brighton Cairo Chicago Cork Dallas Delhi Denver Dublin Florence "
    "Geneva Glasgow Hamburg Helsinki Houston Leeds Leipzig Lima Lisbon London Lyon Madrid Malmo Memphis Milan "
    "Montreal Munich Nairobi Naples Oslo Oxford Paris Porto Prague Quebec Rome Seattle Seoul Sydney Tokyo Toronto "
    "Turin Vienna Warsaw York Zurich"
)
COLOURS = words("black blue brown gold green grey orange pink purple red silver white yellow")
GOODS = words(
    "bags baskets belts blankets boots bottles bowls boxes brushes buckets candles caps chairs clocks cups "
    "curtains cushions desks doors envelopes fans flags folders forks frames gloves hats helmets jackets jars "
    "kettles lamps markers masks mats mirrors mugs napkins notebooks pans pencils pens pillows pipes plates pots "
    "ribbons rugs scarves shelves shirts shoes sofas spoons stools tables tents tiles towels trays umbrellas "
    "vases wallets"
)
