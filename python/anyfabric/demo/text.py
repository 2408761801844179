"""Simple English for the demo model: a seeded grammar that tells short stories.

A story has one person, one friend, one animal, one place and one thing of one colour, and comes
back to them in later sentences. A model that is trained on it therefore has to look far back into
its KV cache to go on correctly, which is what makes it a test of a cache that came over a wire.

The sentences are this project's own. Some names and words are not ASCII, on purpose: a byte-level
model meets them as several tokens.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["stories", "story"]


@dataclass(frozen=True)
class Person:
    """A name and the pronouns that go with it."""

    name: str
    they: str
    them: str
    their: str


WOMEN = ["Mira", "Anna", "Zoë", "Tess", "Olga", "Nadia", "Ruth", "Åsa", "Clara", "Ines", "Hana"]
MEN = ["Tom", "Jürgen", "Paul", "José", "Emil", "Noah", "Karim", "Leo", "Sven", "Björn", "Max"]

THINGS = [
    "kite", "lamp", "boat", "clock", "radio", "ladder", "bicycle", "basket", "drum", "coat",
    "map", "letter", "box", "chair", "kettle", "rope", "bell", "violin", "telescope", "wagon",
]  # fmt: skip
COLOURS = ["red", "blue", "green", "yellow", "white", "black", "brown", "grey", "golden", "silver"]
ANIMALS = ["dog", "cat", "horse", "goat", "crow", "duck", "donkey", "hen", "fox", "hedgehog"]
FOODS = [
    "warm bread", "apple cake", "onion soup", "fresh cheese", "plum jam", "hot tea", "honey",
    "crème brûlée", "roasted nuts", "pea soup", "strong coffee", "cold milk",
]  # fmt: skip
WEATHERS = [
    "it rained", "the sun was out", "a cold wind blew", "snow fell", "fog lay on the fields",
    "the sky was clear", "a storm came up", "it was very hot", "clouds hung over the hills",
]  # fmt: skip
TIMES = [
    "In the morning", "At noon", "In the evening", "Late at night", "After breakfast",
    "Before lunch", "On Sunday", "On the first day of spring", "One day in autumn", "Last winter",
]  # fmt: skip
MOODS = ["happy", "tired", "curious", "proud", "quiet", "a little sad", "very busy", "calm"]
NUMBERS = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "twelve"]
TRADES = ["baker", "carpenter", "teacher", "gardener", "fisher", "doctor", "painter", "miller"]

# A place, and what one may see or hear there.
PLACES: dict[str, list[str]] = {
    "the harbour": [
        "The ships in the harbour came in one after the other.",
        "Every ship carried {number} boxes, and each box had a number on its lid.",
        "{name} counted the boxes on the quay and wrote the number into a book.",
        "The gulls were louder than the cranes.",
    ],
    "the café": [
        "The café had {number} small tables and one long bench.",
        "{friend} brought {food} to the table by the window.",
        "People came to the café to read, and some came only to look at the rain.",
        "The smell of {food} filled the room.",
    ],
    "the garden": [
        "Behind the garden stood {number} old apple trees.",
        "{name} gave water to the beans and pulled out the weeds.",
        "The {animal} slept under the hedge and did not want to move.",
        "By summer the roses had climbed over the wall.",
    ],
    "the workshop": [
        "In the workshop every tool had its own hook on the wall.",
        "{name} sawed the planks, and {friend} held them down.",
        "It took {number} hours until the glue was dry.",
        "There was sawdust on the floor, on the bench and in {their} hair.",
    ],
    "the station": [
        "The train to the city was {number} minutes late.",
        "{name} sat on a bench at the station and watched the signals change.",
        "A voice called out the platforms, but nobody understood it.",
        "When the train came in, the doors opened and {number} people got out.",
    ],
    "the library": [
        "The library kept every page that anyone had ever sent to it.",
        "{name} asked for a book, and {friend} brought it page by page.",
        "No page was lost, and no page came twice.",
        "When all {number} pages had arrived, {name} began to read.",
    ],
    "the mill": [
        "The wheel of the mill turned slowly, because there was little water.",
        "{name} carried {number} sacks of flour up the stairs.",
        "White dust lay on the {thing} and on the {animal} too.",
        "In the mill it was never quiet, not even at night.",
    ],
    "the mountain hut": [
        "The path to the hut was steep, and there were {number} bridges on the way.",
        "From the door of the hut one could see the whole valley.",
        "{friend} made a fire and cooked {food}.",
        "The {animal} lay down in front of the stove.",
    ],
}

OPENINGS = [
    "{name} was a {trade} who lived near {place}.",
    "{name} had a {colour} {thing}.",
    "{time} {name} went to {place} with {their} {animal}.",
    "There was once a {trade} called {name}, and {they} had a {animal}.",
    "{name} and {friend} met at {place}.",
    "This is the story of {name} and the {colour} {thing}.",
    "Nobody at {place} knew why {name} always carried a {colour} {thing}.",
]
CARRY = [
    "{Their} {thing} was {colour}, and {they} took good care of it.",
    "{They} kept the {colour} {thing} at {place}.",
    "The {colour} {thing} had belonged to {their} grandmother.",
    "{They} had bought the {colour} {thing} from {friend} for {number} coins.",
    "{They} wanted to show the {colour} {thing} to {friend}.",
]
MIDDLES = [
    "{time} {weather}, and {name} stayed inside.",
    "{time} {weather}, so {they} walked to {place}.",
    "{friend} asked {them} about the {thing}.",
    '"Where did you get that {colour} {thing}?" asked {friend}.',
    '"I found it near {place}," said {name}.',
    '"Come with me," said {name}, "I will show you {place}."',
    "{They} shared {food} with {friend}.",
    "The {animal} wanted some {food} too.",
    "{name} was {mood}, and {friend} was {mood2}.",
    "{They} worked for {number} hours and then went home.",
    "The {animal} ran ahead and waited at the corner.",
    "{They} could not find the {thing} for {number} days.",
    "{friend} laughed, because the {animal} was sitting on the {thing}.",
    "First {they} looked under the table, then behind the door — nothing.",
    "{They} sent {number} letters to {friend}, and every letter arrived.",
    "It was not far, but the road was full of stones.",
    "{name} told {friend} everything, and {friend} listened until the end.",
    "{They} opened the window and heard a bell in the distance.",
]
ENDINGS = [
    "In the end {name} gave the {colour} {thing} to {friend}.",
    "So {name} took the {colour} {thing} and went home with the {animal}.",
    "From that day on, {name} and {friend} met at {place} every week.",
    "And the {colour} {thing} is still there, at {place}.",
    "That evening {name} was {mood}, and the {animal} slept beside {them}.",
    "{friend} never forgot the {thing} that {name} had brought to {place}.",
]


def stories(seed: int) -> Iterator[str]:
    """Yield stories without end; the same seed gives the same ones."""
    rng = random.Random(seed)
    while True:
        yield story(rng)


def story(rng: random.Random) -> str:
    """Tell one story of 5 to 16 sentences (about 300 to 900 bytes), without a final newline."""
    words = _cast(rng)
    place = words["place"]
    middle = rng.sample(PLACES[place], k=rng.randint(1, 4))
    middle += rng.sample(MIDDLES, k=rng.randint(1, 7))
    middle += rng.sample(CARRY, k=rng.randint(0, 2))
    rng.shuffle(middle)
    # The thing is introduced before anything happens to it.
    lines = [rng.choice(OPENINGS), rng.choice(CARRY)]
    lines += [line for line in middle if line not in lines]
    lines.append(rng.choice(ENDINGS))
    return " ".join(_fill(line, words, rng) for line in lines)


def _cast(rng: random.Random) -> dict[str, str]:
    """Choose what stays the same for a whole story."""
    people = [Person(name, "she", "her", "her") for name in WOMEN]
    people += [Person(name, "he", "him", "his") for name in MEN]
    hero, friend = rng.sample(people, k=2)
    return {
        "name": hero.name,
        "they": hero.they,
        "them": hero.them,
        "their": hero.their,
        "They": hero.they.capitalize(),
        "Their": hero.their.capitalize(),
        "friend": friend.name,
        "place": rng.choice(list(PLACES)),
        "thing": rng.choice(THINGS),
        "colour": rng.choice(COLOURS),
        "animal": rng.choice(ANIMALS),
        "trade": rng.choice(TRADES),
    }


def _fill(template: str, words: dict[str, str], rng: random.Random) -> str:
    """Complete one sentence; food, weather and the like are chosen anew every time."""
    moods = rng.sample(MOODS, k=2)
    return template.format(
        **words,
        food=rng.choice(FOODS),
        weather=rng.choice(WEATHERS),
        time=rng.choice(TIMES),
        number=rng.choice(NUMBERS),
        mood=moods[0],
        mood2=moods[1],
    )
