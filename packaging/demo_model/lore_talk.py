"""Questions and answers about the garden at large: months, pests, animals, tools, reasons and steps.

Runs in: anywhere; owns: nothing.
"""

# ruff: noqa: E501 (a template reads best on one line)
from __future__ import annotations

from collections.abc import Callable
from random import Random

from .grammar import agree, capital, expand, listing
from .lore import ANIMALS, HOWTOS, MONTHS_LORE, PESTS, SOILS, TIPS, TOOLS, WHYS
from .plants import PLANTS, months_between

Exchange = tuple[str, str]
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six")


def numbered(items: list[str]) -> str:
    """A numbered list, one item a line, each a sentence."""
    return "\n".join(f"{i}. {capital(item)}." for i, item in enumerate(items, 1))


def about_month(rng: Random, *, brief: bool) -> Exchange:
    """Jobs, weather, sowing or picking in a month."""
    month = rng.choice(list(MONTHS_LORE))
    lore = MONTHS_LORE[month]
    kind = rng.choice(("jobs", "jobs", "weather", "sow", "pick"))
    if kind == "jobs":
        question = rng.choice((f"What should I do in the garden in {month}?", f"What are the garden jobs for {month}?", f"What is there to do in {month}?", f"It is {month}. What should I do in the garden?", f"List some jobs for {month}."))
        jobs = rng.sample(lore.jobs, 2 if brief else rng.choice((3, 4, 5)))
        if brief or rng.random() < 0.5:
            return question, expand(f"In {month} you {{can|should}} {listing(jobs)}.", rng)
        opening = expand(f"{month} is {lore.weather}. {{Here are some jobs|These jobs are waiting}}:", rng)
        return question, f"{opening}\n\n{numbered(list(jobs))}"
    if kind == "weather":
        question = rng.choice((f"What is the weather like in {month}?", f"What is {month} like in the garden?", f"Tell me about {month}.", f"Describe the garden in {month}."))
        short = f"{month} is {lore.weather}."
        if brief:
            return question, short
        return question, expand(f"{short} It is a month of {lore.season}, and {lore.sight}. {{A good gardener will|It is the time to}} {lore.jobs[rng.randrange(6)]}.", rng)
    starts = [p for p in PLANTS if month in months_between(p.sowing if kind == "sow" else p.harvest)]
    if kind == "sow":
        question = rng.choice((f"What can I sow in {month}?", f"What can I plant in {month}?", f"Which seeds can I start in {month}?"))
        names = [p.seed for p in starts]
        verb = "sow or plant"
    else:
        question = rng.choice((f"What can I harvest in {month}?", f"What is ready in {month}?", f"What can I pick in {month}?"))
        names = [p.crop for p in starts]
        verb = "harvest"
    if not names:
        return question, f"Nothing yet. In {month} the garden rests, so {lore.jobs[rng.randrange(6)]} instead."
    picked = rng.sample(names, min(len(names), 2 if brief else 5))
    return question, expand(f"In {month} you can {verb} {listing(picked)}.", rng)


def about_pest(rng: Random, *, brief: bool) -> Exchange:
    """What a pest does and what helps."""
    name = rng.choice(list(PESTS))
    pest = PESTS[name]
    verb, _, rest = pest.harm.partition(" ")
    harm = f"{agree(verb, plural=pest.plural)} {rest}"
    question = expand(f"{{How do I get rid of {name}?|What can I do about {name}?|How do I stop {name}?|What helps against {name}?|I have a problem with {name}. What should I do?|Help, my garden is full of {name}!|Tell me about {name}.}}", rng)
    hosts = [plant.crop for plant in PLANTS if name in plant.pests]
    if hosts and rng.random() < 0.3:
        eat = "are eating" if pest.plural else "is harming"
        question = capital(rng.choice((f"{name} {eat} my {rng.choice(hosts)}. What should I do?", f"there {'are' if pest.plural else 'is'} {name} on my {rng.choice(hosts)}. What can I do?")))
    cures = rng.sample(pest.cures, 1 if brief else min(3, len(pest.cures)))
    if brief:
        return question, expand(f"Against {name}, {cures[0]}.", rng)
    opening = expand(f"{capital(name)} {harm}. {{The sign to look for is {pest.sign}.|You will notice {pest.sign}.|}}", rng)
    if rng.random() < 0.4:
        return question, f"{opening} Here is what helps:\n\n{numbered(list(cures))}"
    return question, expand(f"{opening} {{What helps|The best answer}}: {'; '.join(cures)}.", rng)


def about_animal(rng: Random, *, brief: bool) -> Exchange:
    """Birds, insects and other neighbours."""
    name = rng.choice(list(ANIMALS))
    animal = ANIMALS[name]
    many = animal.plural_name
    facts = {
        "help": f"{many} are {{good friends of the gardener|welcome in every garden}}: they {animal.helps}.",
        "home": f"You will find them {animal.home}.",
        "sign": f"You know one is near by {animal.sign}.",
        "invite": f"If you want {{more of them|them to stay}}, {animal.invite}.",
        "winter": f"In winter they {animal.winter}.",
    }
    asks = {
        "help": (f"Are {many} good for the garden?", f"What do {many} eat?", f"How do {many} help the gardener?", f"What do {many} do in the garden?"),
        "home": (f"Where do {many} live?", f"Where can I find {many}?"),
        "invite": (f"How do I attract {many} to my garden?", f"How can I get more {many} in my garden?"),
        "winter": (f"What do {many} do in winter?", f"Where do {many} go in winter?"),
        "all": (f"Tell me about {many}.", f"What can you tell me about {many}?", f"Tell me something about {many}.", f"I saw a(n) {name} in my garden today!"),
    }
    kind = rng.choice(list(asks))
    question = expand(rng.choice(asks[kind]), rng)
    if kind == "all":
        picked = [facts[k] for k in facts if not brief or k == "help"]
        return question, expand(("How lovely! " if question.endswith("!") else "") + " ".join(picked), rng)
    others = [k for k in facts if k != kind]
    answer = {
        "help": facts["help"],
        "home": f"{many} live {animal.home}.",
        "invite": f"To {{attract|invite}} {many}, {animal.invite}.",
        "winter": f"In winter {many} {animal.winter}.",
    }[kind]
    return question, expand(answer if brief else f"{answer} {facts[rng.choice(others)]}", rng)


def about_tool(rng: Random, *, brief: bool) -> Exchange:
    """What a tool is for, how to keep and how to choose it."""
    name = rng.choice(list(TOOLS))
    tool = TOOLS[name]
    kind = rng.choice(("use", "care", "choose", "all"))
    question = {
        "use": (f"What is a {name} for?", f"What do I need a {name} for?"),
        "care": (f"How do I look after my {name}?", f"How should I care for a {name}?"),
        "choose": (f"How do I choose a good {name}?", f"Which {name} should I buy?"),
        "all": (f"Tell me about the {name}.", f"Do I need a {name}?"),
    }[kind]
    use, care = f"You use a {name} {tool.use}.", f"To keep it well, {tool.care}."
    if brief:
        answer = {"use": use, "care": f"To keep a {name} well, {tool.care}.", "choose": tool.choose, "all": use}[kind]
    else:
        answer = {"use": f"{use} {tool.choose}", "care": f"To keep a {name} well, {tool.care}. {{Good tools last a lifetime|A clean tool is half the work}}.", "choose": f"{tool.choose} {care}", "all": f"{use} {tool.choose} {care}"}[kind]
    return rng.choice(question), expand(answer, rng)


def about_reason(rng: Random, *, brief: bool) -> Exchange:
    """A why-question."""
    subject, reason = rng.choice(WHYS)
    answer = reason.split(". ")[0] if brief else reason
    opening = "" if brief else rng.choice(("", "", "That is a good question. ", "There is a simple reason: "))
    return f"Why {subject}?", expand(f"{opening}{answer}.", rng)


def about_tips(rng: Random, *, brief: bool) -> Exchange:
    """One tip or a list of them."""
    subject = rng.choice(list(TIPS))
    tips = TIPS[subject]
    if brief or rng.random() < 0.5:
        question = rng.choice((f"Give me a tip for {subject}.", f"Do you have a tip about {subject}?", f"Any advice on {subject}?", f"Give me one tip about {subject}."))
        return question, expand(rng.choice(("", "" if brief else "{Gladly|Of course|Here is one}: ")) + rng.choice(tips), rng)
    count = rng.choice((2, 3, 3, 4))
    question = rng.choice((f"Give me {_NUMBERS[count]} tips for {subject}.", f"List {_NUMBERS[count]} tips about {subject}."))
    return question, "\n".join(f"{i}. {tip}" for i, tip in enumerate(rng.sample(tips, count), 1))


def about_steps(rng: Random, *, brief: bool) -> Exchange:
    """A how-to with steps."""
    task = rng.choice(list(HOWTOS))
    question = expand(f"{{How do I {task}?|How can I {task}?|Explain how to {task}.|Tell me how to {task}.|What is the best way to {task}?|Can you teach me to {task}?}}", rng)
    steps = [expand(step, rng) for step in HOWTOS[task]]
    if brief:
        return question, f"{steps[0]}, then {steps[1][0].lower()}{steps[1][1:]}, and go on from there."
    kind = rng.choice(("list", "list", "prose"))
    if kind == "prose":
        first, *middle, last = steps
        joins = ("Then ", "After that, ", "Next, ", "")
        text = [f"First, {first[0].lower()}{first[1:]}."]
        for step in middle:
            join = rng.choice([j for j in joins if not text[-1].startswith(j) or not j])
            text.append(f"{join}{step[0].lower() + step[1:] if join else step}.")
        text.append(f"Finally, {last[0].lower()}{last[1:]}.")
        return question, " ".join(text)
    opening = rng.choice(("Here is how:", f"To {task}, follow these steps:", f"It takes {len(steps)} steps:", "Step by step:"))
    return question, f"{opening}\n\n{numbered(steps)}"


def about_soil(rng: Random, *, brief: bool) -> Exchange:
    """Kinds of soil."""
    name = rng.choice(list(SOILS))
    look, good, advice, crops = SOILS[name]
    kind = {"sand": "sandy", "chalk": "chalky", "loam": "loamy"}.get(name, name)
    question = expand(f"{{What grows in {kind} soil?|Tell me about {kind} soil.|How do I improve {kind} soil?|I have {kind} soil. What should I do?|What is {name}?}}", rng)
    if brief:
        return question, f"{advice}."
    return question, expand(f"{name} is {look}. {{The good thing is that|On the bright side,}} {good}. {advice}. {{It suits|Good crops for it are}} {listing(crops)}.", rng)


def about_list(rng: Random, *, brief: bool) -> Exchange:
    """Lists of plants and animals by kind."""
    count = rng.choice((2, 3, 3, 3, 4, 5))
    groups: dict[str, list[str]] = {
        "vegetables": [p.crop for p in PLANTS if p.group == "vegetable"],
        "herbs": [p.crop for p in PLANTS if p.group == "herb"],
        "flowers for the kitchen garden": [p.crop for p in PLANTS if p.group == "flower"],
        "plants that like full sun": [p.crop for p in PLANTS if p.light == "full sun"],
        "plants that bear some shade": [p.crop for p in PLANTS if "shade" in p.light],
        "tools every gardener needs": [f"a {tool}" for tool in TOOLS],
        "animals that help the gardener": [a.plural_name for a in ANIMALS.values()],
        "birds in the garden": [ANIMALS[n].plural_name for n in ("robin", "blackbird", "blue tit", "song thrush", "wren", "owl")],
        "insects that help": [ANIMALS[n].plural_name for n in ("ladybird", "bumblebee", "honeybee", "butterfly", "hoverfly")],
        "garden pests": list(PESTS),
        "crops for spring sowing": [p.crop for p in PLANTS if p.sowing[0] in (3, 4, 5)],
        "crops for autumn": [p.crop for p in PLANTS if p.group != "flower" and "October" in months_between(p.harvest)],
    }  # fmt: skip
    kind = rng.choice(list(groups))
    items = rng.sample(groups[kind], min(count, len(groups[kind])))
    verb = rng.choice(("List", "Name", "Tell me"))
    question = f"{verb} {_NUMBERS[len(items)]} {kind}."
    if brief or rng.random() < 0.3:
        return question, capital(listing(items)) + "."
    return question, "\n".join(f"{i}. {capital(item)}" for i, item in enumerate(items, 1))


TALKS: tuple[Callable[..., Exchange], ...] = (
    about_month, about_month, about_pest, about_animal, about_animal, about_tool,
    about_reason, about_reason, about_tips, about_steps, about_steps, about_soil, about_list,
)  # fmt: skip
