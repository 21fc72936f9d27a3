"""Questions and answers about single plants, every one drawn from the same row of facts.

Runs in: anywhere; owns: nothing.
"""

# ruff: noqa: E501 (a template reads best on one line)
from __future__ import annotations

import json
from random import Random

from .grammar import agree, expand, listing
from .lore import PESTS
from .plants import BY_NAME, PLANTS, Plant, when

Exchange = tuple[str, str]


def plant_slots(plant: Plant) -> dict[str, str]:
    """The slots that every plant template may use."""
    many = plant.plural
    return {
        "name": plant.name, "crop": plant.crop, "group": plant.group, "sow": plant.sow, "seed": plant.seed,
        "sow_when": when(plant.sowing), "place": plant.place, "depth": plant.depth, "space": plant.space,
        "sprout": plant.sprout, "light": plant.light, "water": plant.water, "soil": plant.soil,
        "harvest": when(plant.harvest), "ripe": plant.ripe, "tip": plant.tip, "use": plant.use,
        "mates": listing([BY_NAME[mate].crop for mate in plant.mates]),
        "mate": BY_NAME[plant.mates[0]].crop, "pests": listing(plant.pests), "pest": plant.pests[0],
        "they": "they" if many else "it", "them": "them" if many else "it", "their": "their" if many else "its",
        "are": "are" if many else "is", "do": "do" if many else "does", "need": agree("need", plural=many),
        "like": agree("like", plural=many), "grow": agree("grow", plural=many),
        "sown": "sown" if plant.sow == "sow" else "planted", "sowing": plant.sow + "ing",
        "friends_are": "are" if len(plant.mates) > 1 else "is",
    }  # fmt: skip


# aspect -> (questions, follow-up questions, answers)
ASPECTS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "sow when": (
        ("When {should|do|can} I [sow] [seed]?", "When is the best time to [sow] [seed]?", "What month is best for [sowing] [seed]?", "When [do] [crop] get [sown]?", "When can I start [crop]?"),
        ("When should I [sow] [them]?", "When do I [sow] [them]?", "And when do I start?"),
        ("[Sow] [seed] [sow_when], [place].", "The {best|right} time to [sow] [seed] is [sow_when]. [Sow] [them] [place], [depth], and {you will see|expect} the first leaves [sprout].", "[Sow] [seed] [sow_when]. {The place for [them] is|Do it} [place]. [tip]", "You can [sow] [seed] [sow_when]. {If|Where} the {weather|spring} is cold, wait {a week|another week or two}, because {warm|mild} soil is worth more than an early date."),
    ),
    "sow how": (
        ("How do I [sow] [seed]?", "How deep should I [sow] [seed]?", "What is the best way to [sow] [seed]?", "How {are|do I get} [crop] started?"),
        ("How deep do I [sow] [them]?", "How do I [sow] [them]?", "How far apart?"),
        ("[Sow] [seed] [place], [depth], and [space].", "[Sow] [seed] [depth]. The place for [them] is [place], and the plants should stand [space]. Water {gently|with a fine rose}, and the first leaves come up [sprout].", "First {loosen|rake} the soil and take out the stones. Then [sow] [seed] [depth], [place]. {Later|In the end} the plants should stand [space]. Keep the soil moist, and {the first leaves come|you will see green} [sprout]."),
    ),
    "space": (
        ("How much space do [crop] need?", "How far apart should [crop] {be|stand|grow}?", "How much room should I leave between [crop]?"),
        ("How much space [do] [they] need?", "How far apart should [they] be?"),
        ("[Crop] [need] room: leave the plants [space].", "{Set|Leave} the plants [space]. {Crowded plants fight for light and water|With less room they stay small}, so do not be shy about thinning.", "The plants should stand [space]. [tip]"),
    ),
    "light": (
        ("How much sun [do] [crop] need?", "Where should I grow [crop]?", "[Do] [crop] grow in the shade?", "Where [do] [crop] grow best?"),
        ("How much sun [do] [they] need?", "Where should I put [them]?"),
        ("[Crop] [+grow] best in [light].", "[Crop] [like] [light] and [soil].", "Give [them] [light]. {Good neighbours for [them] are|In the same bed you can grow} [mates].", "The best place for [crop] is [light], with [soil]. {There|In such a place} [they] will {do well|thrive} without much work."),
    ),
    "water": (
        ("How often should I water [crop]?", "How much water [do] [crop] need?", "[Do] [crop] need a lot of water?", "How do I water [crop]?"),
        ("How much water [do] [they] need?", "How often should I water [them]?", "And what about water?"),
        ("[Crop] [need] [water].", "Give [them] [water]. {Do it|Water} in the morning, {while the soil is cool|so that the leaves are dry by night}.", "[Crop] [need] [water]. Push a finger into the soil first: if the tip {comes up|stays} moist, {you can wait|wait another day}."),
    ),
    "soil": (
        ("What soil [do] [crop] need?", "What kind of soil is best for [crop]?", "How should I prepare the soil for [crop]?"),
        ("What soil [do] [they] like?", "Which soil is best for [them]?"),
        ("[Crop] [like] [soil].", "The best soil for [crop] is [soil]. If yours is different, {work in some compost|add compost in autumn} and [they] will forgive you.", "[Crop] [+do] best in [soil], in [light]."),
    ),
    "harvest": (
        ("When can I harvest [crop]?", "When {are|do I pick} [crop]{ ready|}?", "When should I {pick|harvest} my [crop]?", "How do I know when [crop] {can be picked|can be harvested}?"),
        ("When can I harvest [them]?", "And when [are] [they] ready?", "How do I know when [they] [are] ready?"),
        ("You can harvest [crop] [harvest], [ripe].", "[Crop] [are] ready [harvest]. The sign to look for: [they] [are] ready [ripe].", "Harvest [them] [harvest], [ripe]. {Choose a dry morning if you can.|Early in the day [they] [+taste] best.|In the kitchen [they] [are] good [use].}"),
    ),
    "mates": (
        ("What grows well with [crop]?", "What {can|should} I plant next to [crop]?", "What are good companions for [crop]?", "Which plants are good neighbours for [crop]?"),
        ("What can I grow beside [them]?", "Which neighbours [do] [they] like?", "What grows well with [them]?"),
        ("Good {neighbours|companions} for [crop] are [mates].", "[Crop] [+grow] well beside [mates]. {They share the light and the soil without a quarrel|Mixed beds confuse the pests}, and the bed {looks|is} prettier too.", "Plant [them] next to [mates]. I would begin with [mate]."),
    ),
    "pests": (
        ("What pests attack [crop]?", "What is eating my [crop]?", "How do I protect [crop] from pests?", "What problems [do] [crop] get?"),
        ("What pests should I look out for?", "Which pests bother [them]?", "What can go wrong with [them]?"),
        ("The usual trouble with [crop] is [pests].", "Look out for [pests]. [cure]", "[Crop] can suffer from [pests]. [cure] {Healthy plants in good soil suffer least.|It also helps to grow [mate] nearby.|}"),
    ),
    "tip": (
        ("Give me a tip for [crop].", "Do you have a tip for growing [crop]?", "What is the secret of good [crop]?", "Any advice on [crop]?", "Give me a tip for growing [crop]."),
        ("Do you have a tip for me?", "Any other advice?", "Is there a trick to it?"),
        ("[tip]", "{Here is one|Yes, gladly|My favourite one}: [tip]", "[tip] And remember that [crop] [like] [light].", "[tip] {Apart from that|Beyond that}, give [them] [water]."),
    ),
    "use": (
        ("What can I cook with [crop]?", "How can I use [crop] in the kitchen?", "What [are] [crop] good for?"),
        ("And what can I cook with [them]?", "What [are] [they] good for in the kitchen?"),
        ("[Crop] [are] good [use].", "In the kitchen [crop] [are] at [their] best [use]. {The fresher the better|Straight from the garden is best}.", "Use [them] [use]. Harvest [them] [ripe], and you will taste the difference."),
    ),
}  # fmt: skip

_OVERVIEW_QUESTIONS = ("Tell me about [crop].", "What can you tell me about [crop]?", "What should I know about [crop]?", "Tell me something about growing [crop].", "Describe [crop].")
_OVERVIEW = (
    "[Crop] {are one of the joys of|belong in} {the|every} kitchen garden. ~[Crop] {is one of the joys of|belongs in} {the|every} kitchen garden.",
    "[Sow] [seed] [sow_when], [place], [depth].",
    "{The first leaves come up|You will see the first leaves} [sprout].",
    "{Later the|The} plants should stand [space].",
    "[Crop] [like] [light] and [soil].",
    "Give [them] [water].",
    "Good {neighbours|companions} are [mates].",
    "{Look out for|The usual trouble is} [pests].",
    "[tip]",
    "You can harvest [them] [harvest], [ripe].",
    "In the kitchen [they] [are] good [use].",
)
_GROW_QUESTIONS = ("How do I grow [crop]?", "How can I grow [crop]?", "Explain how to grow [crop].", "I want to grow [crop]. Where do I start?", "Can you help me grow [crop]?", "Write a short guide to growing [crop].")
_GROW_STEPS = (
    "{Choose|Find} a place with [light]",
    "Prepare [soil]",
    "[Sow] [seed] [sow_when], [place], [depth]",
    "Leave the plants [space]",
    "Give them [water]",
    "Watch out for [pests]",
    "Harvest [harvest], [ripe]",
)
_FACTS = (
    "[Crop] [are] [sown] [sow_when].", "[Crop] [like] [light].", "[Crop] [+grow] best in [soil].",
    "[Crop] [need] [water].", "[Crop] [+grow] well beside [mates].", "[Crop] [are] ready [harvest].",
    "[Crop] [are] good [use].", "The plants should stand [space].", "The usual trouble is [pests].",
)  # fmt: skip
_NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}


def ask(template: str, rng: Random, plant: Plant) -> str:
    """A question about a plant; now and then about one of them: "How do I grow a carrot?"."""
    if plant.plural and rng.random() < 0.12 and " [+" not in template and template.startswith(("How do I grow", "How can I grow", "Where should I grow", "Tell me about", "When can I harvest")):
        template = template.replace("[crop]", "a(n) [name]")
    return say(template, rng, plant)


def say(template: str, rng: Random, plant: Plant) -> str:
    """One template about one plant."""
    slots = plant_slots(plant)
    known = [pest for pest in plant.pests if pest in PESTS]
    if known:
        cure = rng.choice(PESTS[known[0]].cures)
        slots["cure"] = expand(f"Against {known[0]}, {cure}.", rng)
    else:
        slots["cure"] = "Look at the leaves once a week and pick off what does not belong there."
    return expand(template, rng, slots, plural=plant.plural)


def about_aspect(rng: Random, plant: Plant, *, aspect: str, following: bool, brief: bool) -> Exchange:
    """A question on one aspect; ``following`` asks it with a pronoun, ``brief`` takes the shortest answer."""
    questions, follow_ups, answers = ASPECTS[aspect]
    question = ask(rng.choice(follow_ups if following else questions), rng, plant)
    return question, say(answers[0] if brief else rng.choice(answers), rng, plant)


def overview_text(rng: Random, plant: Plant, *, sentences: int) -> str:
    """A paragraph about a plant: the opening and some of the facts, in their natural order."""
    opening = _OVERVIEW[0].split(" ~")[0 if plant.plural else 1]
    picked = sorted(rng.sample(range(1, len(_OVERVIEW)), min(sentences, len(_OVERVIEW)) - 1))
    return " ".join(say(part, rng, plant) for part in [opening, *(_OVERVIEW[i] for i in picked)])


def about_plant(rng: Random, plant: Plant, *, brief: bool) -> Exchange:
    """An open question about a plant: an overview, a guide in steps or a list of facts."""
    kind = rng.choice(("overview", "overview", "guide", "facts"))
    if kind == "overview":
        text = overview_text(rng, plant, sentences=3 if brief else rng.choice((4, 6, 8, 11)))
        return ask(rng.choice(_OVERVIEW_QUESTIONS), rng, plant), text
    if kind == "guide":
        question = ask(rng.choice(_GROW_QUESTIONS), rng, plant)
        if brief:
            return question, say("[Sow] [seed] [sow_when], [place]. Give [them] [light] and [water]. Harvest [harvest].", rng, plant)
        steps = [f"{i}. {say(step, rng, plant)}." for i, step in enumerate(_GROW_STEPS, 1)]
        opening = rng.choice(("Here is how to grow [crop]:", "[Crop] [are] not hard to grow. Follow these steps:", "Gladly. Step by step:"))
        closing = rng.choice(("", "\n\n" + say("[tip]", rng, plant), "\n\nThat is all. Enjoy your harvest!"))
        return question, say(opening, rng, plant) + "\n\n" + "\n".join(steps) + closing
    count = rng.choice((2, 3, 3, 3, 4, 5))
    number = _NUMBERS[count]
    request = rng.choice((f"List {number} facts about [crop].", f"Give me {number} facts about [crop].", f"Name {number} things I should know about [crop]."))
    facts = [say(fact, rng, plant) for fact in rng.sample(_FACTS, count)]
    return say(request, rng, plant), "\n".join(f"{i}. {fact}" for i, fact in enumerate(facts, 1))


def as_json(rng: Random, plant: Plant) -> Exchange:
    """The facts as a JSON object, for programs."""
    facts = {
        "name": plant.crop, "group": plant.group, "sow": when(plant.sowing), "harvest": when(plant.harvest),
        "spacing": plant.space, "light": plant.light, "neighbours": [BY_NAME[mate].crop for mate in plant.mates],
    }  # fmt: skip
    request = rng.choice(("Give me the facts about {} as JSON.", "Describe {} as JSON.", "Write a JSON object about {}.", "Answer in JSON: when do I sow {}?"))
    return request.format(plant.crop), json.dumps(facts)


def compare(rng: Random) -> Exchange:
    """Two plants side by side: may they share a bed, and which comes first."""
    first, second = rng.sample(PLANTS, 2)
    if rng.random() < 0.5:  # half of the pairs are real neighbours
        second = BY_NAME[rng.choice(first.mates)]
    friends = second.name in first.mates or first.name in second.mates
    question = rng.choice((
        f"Can I grow {first.crop} next to {second.crop}?", f"Do {first.crop} and {second.crop} grow well together?",
        f"Are {first.crop} and {second.crop} good neighbours?",
    ))  # fmt: skip
    if friends:
        text = rng.choice(("Yes, {crop} and {other} grow well together.", "Yes, they are good neighbours.", "Yes. {crop} and {other} get along very well."))
    else:
        text = rng.choice(("They do each other no harm, but {crop} would rather stand beside {mates}.", "You can, but better neighbours for {crop} are {mates}."))
    text = text.replace("{crop}", first.crop).replace("{other}", second.crop)
    text = text.replace("{mates}", listing([BY_NAME[mate].crop for mate in first.mates]))
    detail = say(rng.choice(("[Crop] [+grow] best in [light].", "[Crop] [like] [soil].", "Leave the plants [space].", "")), rng, first)
    return question, expand(f"{text} {detail}", rng)


def random_plant(rng: Random) -> Plant:
    """Any plant."""
    return rng.choice(PLANTS)
