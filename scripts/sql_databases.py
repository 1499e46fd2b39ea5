"""The databases of sql_questions.py: their contents and the kinds of question about them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

Value = int | str | tuple[str, str]  # a pair: its form in the question and in the SQL

NAMES = (
    "Adam Alice Amy Anna Ben Bob Carl Carol Chris Clara Dan David Diana Ed Ella Emma Eric Eva Fiona Frank George Grace Hannah "
    "Harry Helen Henry Hugo Ian Iris Jack James Jane John Julia Karl Kate Kevin Laura Leo Linda Lucy Luke Maria Mark Martin "
    "Max Mike Nina Oliver Oscar Paul Peter Rachel Robert Rose Sam Sarah Simon Tom Victor"
).split()
SURNAMES = (
    "Adams Allen Baker Bell Brown Carter Clark Cole Cook Davis Evans Fisher Ford Gray Green Hall Hill Hunt Jones King "
    "Lee Mason Miller Moore Price Reed Scott Smith Stone Taylor White Young"
).split()
CITIES = "Berlin Boston Chicago Dallas Denver Lisbon London Madrid Miami Paris Rome Vienna".split()
TOWNS = "Bath Cambridge Chester Derby Dover Durham Lincoln Leeds Oxford Salem Wells York".split()
GOODS = {
    "garden": "rake spade hose bench ladder bucket".split(),
    "kitchen": "knife kettle pan fork plate bowl".split(),
    "music": "drum flute guitar piano violin horn".split(),
    "office": "desk pen stapler folder printer lamp".split(),
    "pet": "leash cage collar basket whistle brush".split(),
    "sports": "ball racket bat helmet net bicycle".split(),
    "toy": "doll puzzle kite robot train castle".split(),
    "travel": "tent map suitcase compass towel blanket".split(),
}
FIELDS = "bone child eye foot heart lung nerve skin".split()
DAYS = [f"2025-{month:02d}-{day:02d}" for month in range(1, 13) for day in range(1, 29)]
AGES = range(18, 81)

SHARED: dict[str, Sequence[Value]] = {
    "age": range(20, 75),
    "n": range(2, 7),
    "letter": sorted({name[0] for name in NAMES}),
    "ending": sorted({name[-1] for name in NAMES}),
    "month": list(
        zip(
            "January February March April May June July August September October November December".split(),
            [f"{number:02d}" for number in range(1, 13)],
        )
    ),
    "average": [("average", "avg"), ("highest", "max"), ("lowest", "min")],
    "older": [("older than", ">"), ("younger than", "<")],
    "more": [("more than", ">"), ("less than", "<")],
    "above": [("above", ">"), ("below", "<")],
    "dearest": [("most expensive", "DESC"), ("cheapest", "ASC")],
}


@dataclass(frozen=True)
class Database:
    """A database and the kinds of question about it.

    A table has a number of rows and values for each column: used in order if there is one per row, else drawn at random. A
    kind of question maps its SQL template to wordings. Placeholders: ``{city}`` is one of the values of that name, ``{city2}``
    a different one, or the higher of two numbers. In SQL, a placeholder such as ``{sales}`` may also name a join.
    """

    name: str
    tables: Mapping[str, tuple[int, Mapping[str, Sequence[int | str]]]]  # name -> (number of rows, columns)
    joins: Mapping[str, str]
    values: dict[str, Sequence[Value]]
    kinds: Mapping[str, Sequence[str]]


SHOP = Database(
    "shop",
    tables={
        "customers": (60, {"id": range(1, 61), "name": NAMES, "city": CITIES, "age": AGES}),
        "products": (
            48,
            {
                "id": range(1, 49),
                "name": [*chain(*GOODS.values())],
                "category": [category for category, goods in GOODS.items() for _ in goods],
                "price": range(5, 200),
            },
        ),
        "orders": (
            300,
            {"customer_id": range(1, 61), "product_id": range(1, 49), "quantity": range(1, 10), "day": DAYS},
        ),
    },
    joins={
        "sales": "orders JOIN customers ON orders.customer_id = customers.id JOIN products ON orders.product_id = products.id",
    },
    values={
        "city": CITIES,
        "category": [*GOODS],
        "customer": NAMES,
        "product": [*chain(*GOODS.values())],
        "price": range(20, 180, 5),
    },
    kinds={
        "SELECT count(*) FROM customers WHERE city = '{city}' AND age {older} {age}": [
            "How many customers from {city} are {older} {age}?",
            "Count the customers from {city} who are {older} {age}.",
        ],
        "SELECT name, age FROM customers WHERE age BETWEEN {age} AND {age2} ORDER BY age": [
            "Show names and ages of the customers between {age} and {age2}, youngest first.",
            "Which customers are aged {age} to {age2}? Show name and age, youngest first.",
        ],
        "SELECT name, price FROM products WHERE category = '{category}' ORDER BY price {dearest} LIMIT {n}": [
            "Show names and prices of the {n} {dearest} {category} products.",
            "What are the {n} {dearest} {category} products? Show name and price.",
        ],
        "SELECT name, price FROM products WHERE category = '{category}' AND price {more} {price}": [
            "Which {category} products cost {more} {price}? Show name and price.",
            "Show names and prices of all {category} products that cost {more} {price}.",
        ],
        "SELECT name, city FROM customers WHERE name LIKE '{letter}%' AND age {older} {age}": [
            "Which customers {older} {age} have a name that starts with {letter}? Show name and city.",
            "Show names and cities of the customers {older} {age} whose name starts with {letter}.",
        ],
        "SELECT {average}(age) FROM customers WHERE city IN ('{city}', '{city2}')": [
            "What is the {average} age of customers from {city} or {city2}?",
            "Find the {average} age of all customers who live in {city} or {city2}.",
        ],
        "SELECT city, count(*) FROM customers WHERE age {older} {age} GROUP BY city HAVING count(*) >= {n}": [
            "Which cities have at least {n} customers {older} {age}? Show city and number.",
            "Show the cities with {n} or more customers {older} {age}, and how many there are.",
        ],
        "SELECT category, {average}(price) FROM products WHERE price {more} {price} GROUP BY category": [
            "For each category, what is the {average} price of the products that cost {more} {price}?",
            "Show every category and the {average} price of its products that cost {more} {price}.",
        ],
        "SELECT name, age FROM customers WHERE city = '{city}' AND age {older} (SELECT avg(age) FROM customers WHERE city = '{city2}')": [
            "Which customers from {city} are {older} the average customer from {city2}? Show name and age.",
            "Show names and ages of the customers from {city} who are {older} the average in {city2}.",
        ],
        "SELECT DISTINCT products.name FROM {sales} WHERE customers.name = '{customer}' AND products.category = '{category}'": [
            "Which {category} products did {customer} order?",
            "List all {category} products that {customer} has ordered.",
            "What {category} products were ordered by {customer}?",
        ],
        "SELECT DISTINCT customers.name FROM {sales} WHERE products.name = '{product}' AND orders.day LIKE '2025-{month}-%'": [
            "Who ordered the {product} in {month} 2025?",
            "Which customers ordered the {product} in {month} 2025?",
        ],
        "SELECT count(*) FROM {sales} WHERE customers.city = '{city}' AND products.category = '{category}'": [
            "How many orders of {category} products came from {city}?",
            "Count the orders of {category} products by customers from {city}.",
        ],
        "SELECT sum(orders.quantity) FROM {sales} WHERE products.name = '{product}' AND orders.day LIKE '2025-{month}-%'": [
            "How many pieces of the {product} were sold in {month} 2025?",
            "What quantity of the {product} was sold in {month} 2025?",
        ],
        "SELECT name FROM customers WHERE city = '{city}' AND id NOT IN "
        "(SELECT orders.customer_id FROM {sales} WHERE products.category = '{category}')": [
            "Which customers from {city} never ordered a {category} product?",
            "Who in {city} has not ordered any {category} product?",
        ],
        "SELECT name FROM products WHERE category = '{category}' AND id NOT IN "
        "(SELECT product_id FROM orders WHERE day LIKE '2025-{month}-%')": [
            "Which {category} products did nobody order in {month} 2025?",
            "List the {category} products that were not ordered in {month} 2025.",
        ],
        "SELECT DISTINCT customers.city FROM {sales} WHERE products.name = '{product}' AND orders.quantity >= {n}": [
            "From which cities are the customers who ordered at least {n} pieces of the {product}?",
            "Which cities ordered {n} or more pieces of the {product} at once?",
        ],
    },
)
CLINIC = Database(
    "clinic",
    tables={
        "doctors": (32, {"id": range(1, 33), "name": SURNAMES, "field": FIELDS * 4, "fee": range(30, 130)}),
        "patients": (60, {"id": range(1, 61), "name": NAMES, "town": TOWNS, "age": AGES}),
        "visits": (
            300,
            {"doctor_id": range(1, 33), "patient_id": range(1, 61), "minutes": range(5, 61), "day": DAYS},
        ),
    },
    joins={
        "care": "visits JOIN doctors ON visits.doctor_id = doctors.id JOIN patients ON visits.patient_id = patients.id",
    },
    values={
        "town": TOWNS,
        "field": FIELDS,
        "doctor": SURNAMES,
        "patient": NAMES,
        "fee": range(40, 120, 2),
        "length": range(10, 55, 5),
    },
    kinds={
        "SELECT count(*) FROM patients WHERE town = '{town}' AND age {older} {age}": [
            "How many patients from {town} are {older} {age}?",
            "Count the patients from {town} who are {older} {age}.",
        ],
        "SELECT name, fee FROM doctors WHERE fee {above} {fee} ORDER BY fee {dearest} LIMIT {n}": [
            "Show names and fees of the {n} {dearest} doctors with a fee {above} {fee}.",
            "What are the {n} {dearest} doctors whose fee is {above} {fee}? Show name and fee.",
        ],
        "SELECT name, fee FROM doctors WHERE field = '{field}' AND fee {above} {fee}": [
            "Which {field} doctors have a fee {above} {fee}? Show name and fee.",
            "Show names and fees of all {field} doctors with a fee {above} {fee}.",
        ],
        "SELECT name, town FROM patients WHERE name LIKE '%{ending}' AND age {older} {age}": [
            "Which patients {older} {age} have a name that ends with {ending}? Show name and town.",
            "Show names and towns of the patients {older} {age} whose name ends with {ending}.",
        ],
        "SELECT {average}(visits.minutes) FROM {care} WHERE doctors.field = '{field}' AND patients.town = '{town}'": [
            "What is the {average} length in minutes of visits to {field} doctors by patients from {town}?",
            "Find the {average} number of minutes that patients from {town} spent with {field} doctors.",
        ],
        "SELECT town, count(*) FROM patients WHERE age {older} {age} GROUP BY town HAVING count(*) >= {n}": [
            "Which towns have at least {n} patients {older} {age}? Show town and number.",
            "Show the towns with {n} or more patients {older} {age}, and how many there are.",
        ],
        "SELECT field, {average}(fee) FROM doctors WHERE fee {above} {fee} GROUP BY field": [
            "For each field, what is the {average} fee of the doctors with a fee {above} {fee}?",
            "Show every field and the {average} fee of its doctors with a fee {above} {fee}.",
        ],
        "SELECT name, fee FROM doctors WHERE field = '{field}' AND fee {above} "
        "(SELECT {average}(fee) FROM doctors WHERE field = '{field2}')": [
            "Which {field} doctors have a fee {above} the {average} fee of {field2} doctors? Show name and fee.",
            "Show names and fees of the {field} doctors whose fee is {above} the {average} of {field2} doctors.",
        ],
        "SELECT DISTINCT doctors.name FROM {care} WHERE patients.name = '{patient}' AND doctors.field = '{field}'": [
            "Which {field} doctors did {patient} visit?",
            "List all {field} doctors that {patient} has visited.",
            "What {field} doctors were visited by {patient}?",
        ],
        "SELECT DISTINCT patients.name FROM {care} WHERE doctors.name = '{doctor}' AND visits.day LIKE '2025-{month}-%'": [
            "Who visited Dr {doctor} in {month} 2025?",
            "Which patients visited Dr {doctor} in {month} 2025?",
        ],
        "SELECT sum(visits.minutes) FROM {care} WHERE patients.name = '{patient}' AND doctors.field = '{field}'": [
            "How many minutes did {patient} spend with {field} doctors?",
            "How many minutes has {patient} spent with {field} doctors in total?",
        ],
        "SELECT count(*) FROM {care} WHERE patients.town = '{town}' AND doctors.field = '{field}'": [
            "How many visits to {field} doctors came from {town}?",
            "Count the visits to {field} doctors by patients from {town}.",
        ],
        "SELECT count(*) FROM {care} WHERE doctors.name = '{doctor}' AND visits.minutes {more} {length}": [
            "How many visits to Dr {doctor} took {more} {length} minutes?",
            "Count the visits to Dr {doctor} that took {more} {length} minutes.",
        ],
        "SELECT name FROM patients WHERE town = '{town}' AND id NOT IN "
        "(SELECT visits.patient_id FROM {care} WHERE doctors.field = '{field}')": [
            "Which patients from {town} never visited a {field} doctor?",
            "Who in {town} has not visited any {field} doctor?",
        ],
        "SELECT doctors.field, count(*) FROM {care} WHERE patients.age {older} {age} GROUP BY doctors.field": [
            "For each field, how many visits were by patients {older} {age}?",
            "Show every field and the number of visits by patients {older} {age}.",
        ],
        "SELECT DISTINCT patients.town FROM {care} WHERE doctors.name = '{doctor}' AND visits.minutes >= {length}": [
            "From which towns are the patients who spent at least {length} minutes with Dr {doctor}?",
            "Which towns had visits of {length} or more minutes to Dr {doctor}?",
        ],
    },
)
ALL = (SHOP, CLINIC)
