"""Word problems to fill with numbers: each story gives a question, and works its answer out as it is told.

A story is a function of what it draws from and of the sheet on which it works. Every number of an answer comes from
:meth:`Sheet.work`, so an answer cannot disagree with its own sums.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

SHE = (
    "Amara Beatriz Chloe Dalia Elena Farah Grace Hana Ines Jada Keiko Lucia Mina Nora Olive Priya Ruth Sofia Tessa Yara"
)
HE = "Arjun Bruno Caleb Dmitri Emeka Felix Gabriel Hugo Ivan Jamal Kenji Leo Mateo Nikhil Oscar Pavel Rafael Samir Theo"
NAMES = {"she": SHE.split(), "he": HE.split()}
THINGS = ["apples", "pears", "stickers", "marbles", "postcards", "shells", "coins", "buttons", "badges", "pencils"]
GOODS = ["notebooks", "mugs", "candles", "scarves", "puzzles", "lamps", "cushions", "plates", "kites", "baskets"]
PLACES = ["the market", "the village fair", "the school bazaar", "the corner shop", "a street stall"]


class Unfit(Exception):
    """The numbers drawn do not fit the story: a sum came out below 1, or a division left a rest."""


@dataclass(frozen=True)
class Person:
    """Who a story is about."""

    name: str
    he: str  # he or she


class Draw:
    """What chance gives a story."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def number(self, low: int, high: int, step: int = 1) -> int:
        """One of ``low``, ``low + step``, ... up to ``high``, which is included."""
        return self._rng.randrange(low, high + 1, step)

    def one(self, choices: list[str]) -> str:
        return self._rng.choice(choices)

    def person(self) -> Person:
        return self.people(1)[0]

    def people(self, count: int) -> list[Person]:
        """Different people."""
        everyone = [Person(name, he) for he, names in NAMES.items() for name in names]
        return self._rng.sample(everyone, count)


class Sheet:
    """The lines of an answer."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.result = 0

    def work(self, text: str, first: int, *rest: str | int) -> int:
        """Compute ``first op number op number ...`` from left to right, write it down, and give its value.

        Args:
            text: a sentence with ``{sum}`` where ``6 * 2 = 12`` goes, or ``{cost}`` for ``6 * 2 = $12``.
            rest: operators (+ and - together, or * and / together) and numbers in turn.

        Raises:
            Unfit: when a value on the way is below 1 or no whole number.
        """
        operators, numbers = rest[::2], rest[1::2]
        if not (set(operators) <= {"+", "-"} or set(operators) <= {"*", "/"}):
            raise ValueError(f"operators of different rank: {operators}")
        value = first
        for operator, number in zip(operators, numbers, strict=True):
            value = _apply(value, str(operator), int(number))
        expression = " ".join(map(str, (first, *rest)))
        self.lines.append(text.format(sum=f"{expression} = {value}", cost=f"{expression} = ${value}"))
        self.result = value
        return value


def _apply(left: int, operator: str, right: int) -> int:
    if operator == "/":
        value, remainder = divmod(left, right)
    else:
        value, remainder = {"+": left + right, "-": left - right, "*": left * right}[operator], 0
    if value < 1 or remainder:
        raise Unfit
    return value


Story = Callable[[Draw, Sheet], str]


def gift(d: Draw, s: Sheet) -> str:
    a, b = d.people(2)
    thing, had, got = d.one(THINGS), d.number(8, 60), d.number(3, 40)
    s.work(f"{a.name} now has {{sum}} {thing}.", had, "+", got)
    return f"{a.name} has {had} {thing}. {b.name} gives {a.name} {got} more. How many {thing} does {a.name} have now?"


def boxes(d: Draw, s: Sheet) -> str:
    p, item = d.person(), d.one(["muffins", "eggs", "tennis balls", "crayons", "light bulbs"])
    count, size, used = d.number(3, 14), d.number(4, 12), d.number(2, 20)
    total = s.work(f"{count} boxes hold {{sum}} {item}.", count, "*", size)
    s.work(f"After using {used}, there are {{sum}} {item} left.", total, "-", used)
    return (
        f"{p.name} buys {count} boxes of {item}. Each box holds {size} {item}. "
        f"{p.name} uses {used} of them. How many {item} are left?"
    )


def shopping(d: Draw, s: Sheet) -> str:
    p, place = d.person(), d.one(PLACES)
    n, price, m, other = d.number(2, 9), d.number(2, 15), d.number(2, 9), d.number(2, 15)
    good, second = d.one(GOODS[:5]), d.one(GOODS[5:])
    first = s.work(f"The {good} cost {{cost}}.", n, "*", price)
    rest = s.work(f"The {second} cost {{cost}}.", m, "*", other)
    s.work(f"In total {p.name} pays {{cost}}.", first, "+", rest)
    return (
        f"At {place}, {p.name} buys {n} {good} for ${price} each and {m} {second} for ${other} each. "
        f"How many dollars does {p.he} pay in total?"
    )


def change(d: Draw, s: Sheet) -> str:
    p, good = d.person(), d.one(GOODS)
    n, price, note = d.number(2, 6), d.number(2, 15), d.number(20, 100, 20)
    cost = s.work(f"The {good} cost {{cost}}.", n, "*", price)
    s.work("The change is {cost}.", note, "-", cost)
    return (
        f"{p.name} pays for {n} {good} with ${note}. Each of the {good} costs ${price}. "
        f"How much change does {p.he} get, in dollars?"
    )


def savings(d: Draw, s: Sheet) -> str:
    p, aim = d.person(), d.one(["a bicycle", "a guitar", "a tent", "a telescope", "a skateboard"])
    weekly, weeks, spent = d.number(4, 25), d.number(4, 16), d.number(5, 40)
    saved = s.work(f"In {weeks} weeks {p.name} saves {{cost}}.", weeks, "*", weekly)
    s.work(f"After spending ${spent}, {p.he} has {{cost}}.", saved, "-", spent)
    return (
        f"{p.name} is saving for {aim} and puts aside ${weekly} every week. After {weeks} weeks {p.he} takes out "
        f"${spent} for a birthday present. How many dollars are left?"
    )


def weeks_to_save(d: Draw, s: Sheet) -> str:
    p, aim = d.person(), d.one(["a camera", "a drum kit", "a kayak", "a sewing machine", "a violin"])
    weekly, weeks, have = d.number(5, 20), d.number(3, 15), d.number(10, 60)
    price = have + weekly * weeks
    missing = s.work(f"{p.name} still needs {{cost}}.", price, "-", have)
    s.work("That takes {sum} weeks.", missing, "/", weekly)
    return (
        f"{p.name} wants {aim} that costs ${price}. {p.he.capitalize()} already has ${have} and saves ${weekly} "
        f"a week. How many weeks will it take until {p.he} can buy it?"
    )


def sharing(d: Draw, s: Sheet) -> str:
    p, thing = d.person(), d.one(THINGS)
    friends, each, kept = d.number(2, 9), d.number(3, 12), d.number(2, 15)
    total = friends * each + kept
    given = s.work(f"{p.name} gives away {{sum}} {thing}.", total, "-", kept)
    s.work(f"Each friend gets {{sum}} {thing}.", given, "/", friends)
    return (
        f"{p.name} collected {total} {thing}. {p.he.capitalize()} keeps {kept} and shares the rest equally among "
        f"{friends} friends. How many {thing} does each friend get?"
    )


def times_as_many(d: Draw, s: Sheet) -> str:
    a, b = d.people(2)
    thing, n, factor = d.one(THINGS), d.number(4, 30), d.number(2, 6)
    word = {2: "twice", 3: "three times", 4: "four times", 5: "five times", 6: "six times"}[factor]
    other = s.work(f"{b.name} has {{sum}} {thing}.", factor, "*", n)
    s.work(f"Together they have {{sum}} {thing}.", n, "+", other)
    return (
        f"{a.name} has {n} {thing}, and {b.name} has {word} as many. How many {thing} do {a.name} and {b.name} "
        "have together?"
    )


def three_friends(d: Draw, s: Sheet) -> str:
    a, b, c = d.people(3)
    sport, n, more, fewer = d.one(["goals", "points", "baskets"]), d.number(10, 40), d.number(2, 15), d.number(2, 9)
    second = s.work(f"{b.name} scored {{sum}} {sport}.", n, "+", more)
    third = s.work(f"{c.name} scored {{sum}} {sport}.", second, "-", fewer)
    s.work(f"The three scored {{sum}} {sport}.", n, "+", second, "+", third)
    return (
        f"During the season {a.name} scored {n} {sport}. {b.name} scored {more} more than {a.name}, and {c.name} "
        f"scored {fewer} fewer than {b.name}. How many {sport} did the three of them score altogether?"
    )


def trip(d: Draw, s: Sheet) -> str:
    p, way = d.person(), d.one(["drives", "rides a train", "takes a bus"])
    speed, hours, slow, more = d.number(40, 90, 5), d.number(2, 6), d.number(20, 40, 5), d.number(2, 4)
    first = s.work("The first part is {sum} kilometers long.", speed, "*", hours)
    second = s.work("The second part is {sum} kilometers long.", slow, "*", more)
    s.work("The whole trip is {sum} kilometers long.", first, "+", second)
    return (
        f"{p.name} {way} for {hours} hours at {speed} kilometers per hour, and then for {more} hours at {slow} "
        f"kilometers per hour. How many kilometers does {p.he} travel?"
    )


def trip_time(d: Draw, s: Sheet) -> str:
    p, speed, hours, done = d.person(), d.number(30, 80, 5), d.number(2, 7), d.number(15, 120, 5)
    length = done + speed * hours
    left = s.work("There are {sum} miles left to go.", length, "-", done)
    s.work("That takes {sum} hours.", left, "/", speed)
    return (
        f"The road to the coast is {length} miles long. {p.name} has already covered {done} miles and drives on at "
        f"{speed} miles per hour. How many more hours will it take {p.name} to get there?"
    )


def wages(d: Draw, s: Sheet) -> str:
    p, job = d.person(), d.one(["in a library", "at a garden center", "in a bike shop", "at a swimming pool"])
    wage, hours, days, bonus = d.number(9, 24), d.number(3, 8), d.number(3, 6), d.number(10, 60, 5)
    daily = s.work(f"{p.name} earns {{cost}} a day.", wage, "*", hours)
    week = s.work(f"In {days} days {p.he} earns {{cost}}.", daily, "*", days)
    s.work(f"With the bonus {p.he} gets {{cost}}.", week, "+", bonus)
    return (
        f"{p.name} works {job} for ${wage} an hour, {hours} hours a day, {days} days a week. This week there is a "
        f"bonus of ${bonus}. How many dollars does {p.name} get for the week?"
    )


def overtime(d: Draw, s: Sheet) -> str:
    p, wage, hours, extra, more = d.person(), d.number(10, 22), d.number(20, 40), d.number(2, 9), d.number(3, 10)
    normal = s.work(f"For the normal hours {p.name} earns {{cost}}.", hours, "*", wage)
    rate = s.work("An extra hour pays {cost}.", wage, "+", more)
    added = s.work("The extra hours pay {cost}.", extra, "*", rate)
    s.work(f"Altogether {p.he} earns {{cost}}.", normal, "+", added)
    return (
        f"{p.name} is paid ${wage} an hour, and ${more} more than that for each extra hour. Last week {p.he} worked "
        f"{hours} normal hours and {extra} extra hours. How many dollars did {p.he} earn?"
    )


def discount(d: Draw, s: Sheet) -> str:
    p, thing = d.person(), d.one(["jacket", "backpack", "desk", "pair of boots", "watch", "keyboard"])
    price, percent = d.number(20, 200, 10), d.number(10, 60, 10)
    off = s.work("The discount is {cost}.", price, "*", percent, "/", 100)
    s.work(f"{p.name} pays {{cost}}.", price, "-", off)
    return (
        f"A {thing} usually costs ${price}, but today it is {percent}% off. "
        f"How many dollars does {p.name} pay for the {thing} today?"
    )


def survey(d: Draw, s: Sheet) -> str:
    total, percent = d.number(40, 300, 20), d.number(10, 80, 5)
    what = d.one(["walk to school", "play an instrument", "have a pet", "read every evening", "like spinach"])
    yes = s.work(f"{{sum}} students {what}.", total, "*", percent, "/", 100)
    s.work("So {sum} students do not.", total, "-", yes)
    return (
        f"In a survey of {total} students, {percent}% said that they {what}. How many students said that they do not?"
    )


def garden(d: Draw, s: Sheet) -> str:
    p, plant = d.person(), d.one(["tulips", "tomatoes", "cabbages", "sunflowers", "strawberry plants"])
    rows, each, died = d.number(4, 15), d.number(5, 16), d.number(3, 18)
    planted = s.work(f"{p.name} plants {{sum}} {plant}.", rows, "*", each)
    s.work(f"After the frost {{sum}} {plant} are left.", planted, "-", died)
    return (
        f"{p.name} plants {rows} rows of {plant} with {each} in every row. A late frost kills {died} of them. "
        f"How many {plant} survive?"
    )


def fence(d: Draw, s: Sheet) -> str:
    p, length, width, price = d.person(), d.number(8, 40), d.number(4, 25), d.number(3, 12)
    half = s.work("One long and one short side measure {sum} meters.", length, "+", width)
    around = s.work("All the way around it is {sum} meters.", 2, "*", half)
    s.work("The fence costs {cost}.", around, "*", price)
    return (
        f"{p.name} builds a fence around a rectangular field that is {length} meters long and {width} meters wide. "
        f"Fencing costs ${price} per meter. How many dollars does the fence cost?"
    )


def tiles(d: Draw, s: Sheet) -> str:
    p, length, width, pack = d.person(), d.number(4, 12), d.number(3, 10), d.number(2, 8)
    area = s.work("The floor has {sum} square meters.", length, "*", width)
    s.work(f"{p.name} needs {{sum}} packs.", area, "/", pack)
    return (
        f"{p.name} tiles a floor that is {length} meters long and {width} meters wide. One pack of tiles covers "
        f"{pack} square meters. How many packs does {p.name} need?"
    )


def recipe(d: Draw, s: Sheet) -> str:
    p, dish, what = d.person(), d.one(["pancakes", "waffles", "banana bread", "cookies"]), d.one(["flour", "sugar"])
    people, times, grams = d.number(2, 6), d.number(2, 6), d.number(50, 400, 25)
    guests = people * times
    factor = s.work("The recipe has to be made {sum} times.", guests, "/", people)
    s.work(f"{p.name} needs {{sum}} grams of {what}.", factor, "*", grams)
    return (
        f"A recipe for {dish} serves {people} people and takes {grams} grams of {what}. {p.name} cooks for {guests} "
        f"people. How many grams of {what} does {p.he} need?"
    )


def bus(d: Draw, s: Sheet) -> str:
    start, off, on, last = d.number(12, 40), d.number(3, 15), d.number(2, 18), d.number(2, 12)
    stop = d.one(["the library", "the hospital", "the station", "the stadium", "the old bridge"])
    after = s.work(f"After {stop} there are {{sum}} people on the bus.", start, "-", off, "+", on)
    s.work("After the next stop there are {sum} people on the bus.", after, "-", last)
    return (
        f"A bus leaves the depot with {start} people. At {stop} {off} people get off and {on} get on. At the next stop "
        f"{last} people get off. How many people are on the bus now?"
    )


def ages(d: Draw, s: Sheet) -> str:
    a, b = d.people(2)
    age, factor, years = d.number(4, 15), d.number(2, 4), d.number(2, 12)
    older = s.work(f"{b.name} is {{sum}} years old.", factor, "*", age)
    s.work(f"In {years} years {b.name} will be {{sum}} years old.", older, "+", years)
    return (
        f"{a.name} is {age} years old. {b.name} is {factor} times as old as {a.name}. "
        f"How old will {b.name} be in {years} years?"
    )


def reading(d: Draw, s: Sheet) -> str:
    p, pages, days, more = d.person(), d.number(8, 40), d.number(3, 9), d.number(3, 10)
    rate = pages + d.number(2, 12)
    first = s.work(f"In the first {days} days {p.name} reads {{sum}} pages.", pages, "*", days)
    second = s.work(f"In the next {more} days {p.he} reads {{sum}} pages.", rate, "*", more)
    s.work("The book has {sum} pages.", first, "+", second)
    return (
        f"{p.name} reads {pages} pages of a book a day for {days} days, then {rate} pages a day for {more} days, and "
        "has then finished it. How many pages does the book have?"
    )


def pages_left(d: Draw, s: Sheet) -> str:
    p, total, pages, days = d.person(), d.number(120, 480, 10), d.number(8, 40), d.number(3, 10)
    read = s.work(f"{p.name} has read {{sum}} pages.", pages, "*", days)
    s.work("There are {sum} pages left.", total, "-", read)
    return (
        f"{p.name}'s book has {total} pages. {p.he.capitalize()} reads {pages} pages every evening. "
        f"How many pages are left after {days} evenings?"
    )


def farm(d: Draw, s: Sheet) -> str:
    bird, beast = d.one(["chickens", "ducks", "geese"]), d.one(["cows", "sheep", "goats"])
    birds, beasts = d.number(5, 40), d.number(3, 30)
    few = s.work(f"The {bird} have {{sum}} legs.", birds, "*", 2)
    many = s.work(f"The {beast} have {{sum}} legs.", beasts, "*", 4)
    s.work("Together they have {sum} legs.", few, "+", many)
    return (
        f"A farm keeps {birds} {bird} with 2 legs each and {beasts} {beast} with 4 legs each. "
        "How many legs do all these animals have?"
    )


def eggs(d: Draw, s: Sheet) -> str:
    p, hens, kept, price, days = d.person(), d.number(10, 40), d.number(2, 9), d.number(2, 4), d.number(2, 7)
    sold = s.work(f"{p.name} sells {{sum}} eggs a day.", hens, "-", kept)
    daily = s.work("That brings {cost} a day.", sold, "*", price)
    s.work(f"In {days} days {p.he} makes {{cost}}.", daily, "*", days)
    return (
        f"{p.name}'s hens lay {hens} eggs a day. {p.he.capitalize()} keeps {kept} of them and sells the others for "
        f"${price} each. How many dollars does {p.he} make in {days} days?"
    )


def factory(d: Draw, s: Sheet) -> str:
    machines, rate, hours, bad = d.number(2, 9), d.number(10, 60, 5), d.number(3, 10), d.number(4, 60)
    part = d.one(["bolts", "bottles", "toy cars", "pens", "bricks"])
    hourly = s.work(f"The machines make {{sum}} {part} an hour.", machines, "*", rate)
    made = s.work(f"In {hours} hours they make {{sum}} {part}.", hourly, "*", hours)
    s.work(f"Without the faulty ones there are {{sum}} {part}.", made, "-", bad)
    return (
        f"Each of the {machines} machines in a factory makes {rate} {part} an hour. They run for {hours} hours, and "
        f"{bad} of the {part} turn out faulty. How many good {part} are made?"
    )


def theater(d: Draw, s: Sheet) -> str:
    what = d.one(["A theater", "A cinema", "A concert hall", "A circus tent"])
    rows, seats, free, price = d.number(8, 25), d.number(8, 24), d.number(5, 60), d.number(4, 15)
    total = s.work("There are {sum} seats.", rows, "*", seats)
    sold = s.work("{sum} seats are taken.", total, "-", free)
    s.work("The tickets bring in {cost}.", sold, "*", price)
    return (
        f"{what} has {rows} rows of {seats} seats. Tonight {free} seats stay empty, and each of the other tickets "
        f"costs ${price}. How many dollars do the tickets bring in?"
    )


def class_trip(d: Draw, s: Sheet) -> str:
    students, adults, size = d.number(20, 90), d.number(2, 12), d.number(5, 12)
    rounded = students + adults + (-(students + adults)) % size
    students = rounded - adults
    place = d.one(["the museum", "the zoo", "the planetarium", "the science fair"])
    people = s.work("{sum} people go on the trip.", students, "+", adults)
    s.work("They need {sum} vans.", people, "/", size)
    return (
        f"{students} students and {adults} adults visit {place}. They travel in vans that hold {size} people each. "
        "How many vans do they need?"
    )


def half_then_more(d: Draw, s: Sheet) -> str:
    a, b = d.people(2)
    thing, n, more = d.one(THINGS), d.number(12, 80, 2), d.number(2, 10)
    half = s.work(f"{a.name} gives {{sum}} {thing} to {b.name}.", n, "/", 2)
    left = s.work(f"Then {a.name} has {{sum}} {thing}.", n, "-", half)
    s.work(f"After losing {more}, {a.he} has {{sum}} {thing}.", left, "-", more)
    return (
        f"{a.name} has {n} {thing}. {a.he.capitalize()} gives half of them to {b.name} and then loses {more}. "
        f"How many {thing} does {a.name} have in the end?"
    )


def tank(d: Draw, s: Sheet) -> str:
    rate, leak, minutes, have = d.number(8, 30), d.number(1, 6), d.number(5, 40, 5), d.number(10, 90, 10)
    gain = s.work("Every minute the tank gains {sum} liters.", rate, "-", leak)
    added = s.work(f"In {minutes} minutes it gains {{sum}} liters.", gain, "*", minutes)
    s.work("Then it holds {sum} liters.", have, "+", added)
    return (
        f"A tank holds {have} liters of water. A tap adds {rate} liters a minute, while {leak} "
        f"{'liter leaks' if leak == 1 else 'liters leak'} out every minute. How many liters are in the tank after "
        f"{minutes} minutes?"
    )


def elevator(d: Draw, s: Sheet) -> str:
    p, start, up, down = d.person(), d.number(2, 12), d.number(4, 20), d.number(2, 10)
    above = s.work(f"{p.name} first rides up to floor {{sum}}.", start, "+", up)
    s.work(f"Then {p.he} rides down to floor {{sum}}.", above, "-", down)
    return (
        f"{p.name} gets into an elevator on floor {start}. It goes up {up} floors and then down {down} floors. "
        "On which floor is it now?"
    )


def average(d: Draw, s: Sheet) -> str:
    p, what = d.person(), d.one(["minutes of piano practice", "laps in the pool", "pages of homework"])
    mean, low, high = d.number(12, 50), d.number(1, 10), d.number(1, 10)
    parts = [mean - low, mean + high, mean + low - high]
    total = s.work("The three days sum up to {sum}.", parts[0], "+", parts[1], "+", parts[2])
    s.work("The average is {sum}.", total, "/", 3)
    return (
        f"{p.name} did {parts[0]} {what} on Monday, {parts[1]} on Tuesday and {parts[2]} on Wednesday. "
        "What was the average per day?"
    )


def calendar(d: Draw, s: Sheet) -> str:
    p, weeks, each, skipped = d.person(), d.number(2, 12), d.number(2, 9), d.number(2, 9)
    what = d.one(["push-ups", "new words", "sketches", "math exercises"])
    days = s.work("That is {sum} days.", weeks, "*", 7)
    active = s.work(f"{p.name} is busy on {{sum}} of them.", days, "-", skipped)
    s.work(f"In all {p.he} does {{sum}} {what}.", active, "*", each)
    return (
        f"For {weeks} weeks {p.name} plans to do {each} {what} a day, every day of the week, but skips {skipped} days. "
        f"How many {what} does {p.he} do in all?"
    )


def rental(d: Draw, s: Sheet) -> str:
    p, what = d.person(), d.one(["canoe", "bicycle", "surfboard", "camper van"])
    fee, hourly, hours, friends = d.number(5, 30), d.number(4, 18), d.number(2, 8), d.number(2, 5)
    time = s.work(f"The {hours} hours cost {{cost}}.", hours, "*", hourly)
    total = s.work("With the fee it is {cost}.", time, "+", fee)
    s.work("Each one pays {cost}.", total, "/", friends)
    return (
        f"A {what} can be rented for a fee of ${fee} plus ${hourly} an hour. A group of {friends}, {p.name} among "
        f"them, rents it for {hours} hours and splits the cost equally. How many dollars does each one pay?"
    )


def profit(d: Draw, s: Sheet) -> str:
    p, good, n = d.person(), d.one(GOODS), d.number(5, 30)
    cost, gain, stall = d.number(2, 10), d.number(3, 12), d.number(5, 40, 5)
    price = cost + gain
    each = s.work(f"{p.name} gains {{cost}} on each.", price, "-", cost)
    total = s.work(f"On all {good} {p.he} gains {{cost}}.", n, "*", each)
    s.work("After paying for the stall, {cost} remain.", total, "-", stall)
    return (
        f"{p.name} makes {n} {good} at a cost of ${cost} each and sells all of them for ${price} each at a stall that "
        f"costs ${stall} to rent. How many dollars of profit does {p.he} make?"
    )


STORIES: tuple[Story, ...] = (
    gift, boxes, shopping, change, savings, weeks_to_save, sharing, times_as_many, three_friends, trip, trip_time,
    wages, overtime, discount, survey, garden, fence, tiles, recipe, bus, ages, reading, pages_left, farm, eggs,
    factory, theater, class_trip, half_then_more, tank, elevator, average, calendar, rental, profit,
)  # fmt: skip
