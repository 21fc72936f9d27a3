"""Little stories, poems and diary pages. A story is an arc of beats; each beat is told in one of several ways.

Runs in: anywhere; owns: nothing.
"""

# ruff: noqa: E501 (a template reads best on one line)
from __future__ import annotations

from random import Random

from .grammar import expand
from .lore import ANIMALS, MONTHS_LORE
from .plants import PLANTS, Plant

WOMEN = ("Ada", "Mara", "Nora", "Ruth", "Clara", "Ines", "Lena", "Olive", "Hanna", "Rosa", "Edith", "Mina", "Greta", "Sofia")
MEN = ("Tom", "Emil", "Otto", "Jonas", "Peter", "Hugo", "Arlo", "Felix", "Anton", "Ben", "Karl", "Leo", "Samuel", "Victor")
NEIGHBOURS = (("Mrs Finch", "she", "her"), ("Mr Alder", "he", "his"), ("Mrs Holm", "she", "her"), ("Mr Penn", "he", "his"), ("Miss Carver", "she", "her"), ("old Mr Brook", "he", "his"), ("Mrs Tarn", "she", "her"), ("Mr Lowe", "he", "his"))  # fmt: skip

_OPEN = ("{One [weather] {morning|afternoon|day} in [month],|It was a [weather] {morning|afternoon|day} in [month], and}", "{Early|Late} in [month]{,| one year,}", "{In the village by the river|At the end of the lane|Behind the old mill|In a small house with a blue door} {there lived|lived} a gardener {named|called} [hero]. {One|On a} [weather] {morning|day} in [month]{,|}", "Once upon a time there was a gardener {named|called} [hero]. {One|On a} [weather] {morning|day} in [month]{,|}")  # fmt: skip

# Each arc: beats in order; a beat is a tuple of ways to tell it.
ARCS: dict[str, tuple[tuple[str, ...], ...]] = {
    "animal": (
        ("[hero] {found|saw|met} a(n) {small|young|tired|hungry} [animal] {under the hedge|beside the water butt|behind the shed|between the [crop]}.", "[hero] went out to look at the [crop] and {found|saw} a(n) {small|young|tired|hungry} [animal] {sitting on the path|beside the gate}."),
        ("{[He] stood very still.|[He] put down [his] basket.} The [animal] {looked at [him]|did not move} and {did not run away|seemed to wait for something}.", '"{Good morning|Hello}, little one," said [hero]. "{Are you lost|Are you hungry}?" The [animal] {only blinked|gave no answer}.'),
        ("{It was thin, for the {winter|spring} had been long.|One of its feet was caught in a piece of string.|It had come a long way and was {thirsty|tired}.}", "{[hero] thought for a while.|[hero] remembered what [his] grandmother used to say: a garden is for everyone.}"),
        ("So [he] {fetched|brought} {a dish of water|a handful of crumbs|some dry leaves} and {set it down|put it} {in the shade|by the wall|under the bench}. Then [he] went back to [his] work.", "[He] {asked|called} [neighbour] over the fence, and together they {made a small house of twigs|set out a dish of water|built a shelter under the hedge}."),
        ("{Every|Each} evening {after that|from then on} the [animal] came back. {[hero] pretended not to see it.|[hero] left the gate open a hand wide.|Soon it was no longer afraid.}", "{Days passed.|A week went by.} The [animal] {grew strong|learned the way to the shed}, and [hero] {grew used to|began to like} the company."),
        ("That {summer|year} the [crop] grew better than ever, for {there was someone to keep watch at night|the [animal] had good work to do|no pest dared to come near}.", "And {when|as} the {slugs|pests} came for the [crop], they found that {someone was already there|the garden had a guard}."),
        ('"{A good neighbour|A friend}," said [hero], "{does not need to speak|can be very small}." {And the [animal] stayed.|The [animal] seemed to agree.}', "{To this day|And ever since,} [hero] keeps a quiet corner in the garden, and {nobody is allowed to tidy it|it belongs to the [animal]}."),
    ),
    "giant crop": (
        ("[hero] {noticed|saw} that one of the [crop] had grown {larger|bigger} than all the others.", "[hero] {sowed|planted} the [crop] as [he] did every year, but one plant {would not stop growing|grew faster than the rest}."),
        ("By {Monday|the end of the week} it was as {high|tall} as the fence. By {Friday|the next week} it was as {high|tall} as the shed.", "It grew in the {morning|sun} and it grew in the {evening|rain}, and soon it {filled the whole bed|looked over the wall}."),
        ('"What do you feed it?" asked [neighbour]. "{Only water and compost|Nothing but kind words}," said [hero].', '[neighbour] {came to look|leaned over the fence}. "I have never seen such a thing," [nhe] said, and {went home for [nhis] ruler|called the others}.'),
        ("{People came from the next village.|The children came after school.|Even the postman stopped.} They {shook their heads|laughed} and {measured it with string|asked for seed}.", "{Nobody in the village had a pot that was large enough.|[hero] wondered what to do with so much food.}"),
        ("{At last|In the end} [hero] {had an idea|made up [his] mind}. [He] {borrowed|fetched} {every pot in the lane|the biggest kettle in the village} and {lit a fire|set up a long table}.", "So [he] {wrote|sent} {a note|an invitation} to {everyone|every house} in the lane: come on Sunday and bring a spoon."),
        ("They {cooked|made} soup {for a whole day|until the stars came out}, and there was enough for {everyone|the whole village} {twice|and for the hens}.", "{On Sunday they all sat down together|There was soup, there was bread, and there was music}, and {nobody|no one} went home hungry."),
        ("[hero] kept {one seed|a few seeds} in {a matchbox|an envelope}. On it [he] wrote: {for next year|handle with care|leave plenty of room}.", "{And the seed?|What became of the seed?} [hero] gave one to {everybody|each guest}. {Next year the lane was full of giants.|It is said that they are still growing.}"),
    ),
    "storm": (
        ("the {sky|air} turned {dark|yellow|heavy}, and [hero] {knew|could smell} that a storm was coming.", "the swallows flew low, and [hero] {looked up at the clouds|knew that rain was near}."),
        ("[He] {ran|hurried} to {tie up|cover} the [crop], but the {wind was faster|first drops were already falling}.", "[He] {carried the pots into the shed|closed the cold frame} and {tied the [crop] to their stakes|weighed down the nets with stones}."),
        ("All night the {rain beat on the roof|wind pulled at the shutters}. [hero] {lay awake|could not sleep} and thought of the garden.", "{Thunder rolled over the hill|Hail jumped on the path}, and the {gate|old pear tree} {creaked|groaned} in the dark."),
        ("In the morning {[he] opened the door with a heavy heart|everything was quiet}. {The [crop] lay flat in the mud.|Half of the fence was gone, and the [crop] lay on the ground.}", "When the sun came up, {leaves and twigs lay everywhere|the beds looked like a battlefield}, and the [crop] {were bent to the ground|had lost half of their leaves}."),
        ('[neighbour] {was already at the gate|came down the lane} with {a spade|a bundle of canes|a ball of string}. "{Well|Come}," [nhe] said, "{two backs are better than one|let us begin}."', "Then {the neighbours came|[neighbour] came}, with {string and canes|spades and a pot of tea}, and {nobody|no one} had to be asked."),
        ("They {worked|dug and tied and swept} until {noon|evening}. {They talked little and laughed often.|By then the beds looked almost as before.}", "They {lifted every plant|tied up what could be tied}, and what was broken went {to the hens|on the compost}."),
        ("{Two weeks later|By the end of the month} the [crop] stood up straight again. {A storm is hard, thought [hero], but it shows you who your neighbours are.|Plants are stronger than they look, and so are people.}", '"{Will they live|Do you think they will grow}?" asked [hero]. "{Wait and see|Roots first, then leaves}," said [neighbour]. {And so it was.|And [nhe] was right.}'),
    ),
    "first garden": (
        ("[hero] {was given|got} a {packet|paper bag} of [seed_word] and {did not know|had no idea} what to do with it.", "[hero] {moved into|bought} a house with a garden {full of nettles|where nothing grew but grass}, and [he] had never {held a spade|grown anything} in [his] life."),
        ('"{Is it hard|Is it difficult}?" [he] asked [neighbour]. "{It is easy to begin|The first year is the best teacher}," [nhe] said{, and smiled|}.', "[neighbour] {watched for a while|saw [him] stand there}. Then [nhe] {lent [him] a spade|came over with a rake and two cups of tea}."),
        ("{Together they|First they} {cleared|dug} a bed {no larger than a table|beside the wall}. {Then they sowed the [crop] in a straight row.|They raked it fine and sowed the [crop].}", "[hero] {sowed|planted} the [crop] and {wrote a label|drew a little plan}. [He] {looked at the bed|went out to look} every morning before breakfast."),
        ("For {days|two weeks} {nothing happened|the soil stayed bare}. [hero] {began to worry|watered and waited}.", "Nothing came up. {The rain fell and the sun shone, and still the bed was brown.|[hero] was sure that [he] had done something wrong.}"),
        ('"{Seeds are slow|A seed cannot read the calendar}," said [neighbour]. "{Give them time|Be patient}."', "[neighbour] only laughed. {Patience, [nhe] said, is the one tool you cannot buy.|You can not pull a plant out by its leaves, [nhe] said.}"),
        ("Then, {one|on a} [weather] morning, {there was a thin green line|a row of green tips stood in the soil}. [hero] {called|ran to tell} {everyone in the house|[neighbour]}.", "And then {it happened|they came}: {small green leaves|green tips}, first one and then {ten|a hundred}. [hero] {knelt down to count them|forgot [his] breakfast}."),
        ("In {summer|the end} [hero] {carried a basket of [crop] next door|shared the harvest with [neighbour]}. {They had never tasted anything better.|It was only a small basket, but [he] had never been so proud.}", "The harvest was {small|not large}, {but every bite was a triumph|yet it filled the kitchen with its smell}. {Next year, [hero] decided, there would be two beds.|That evening [he] ordered seeds for the next year.}"),
    ),
    "quarrel": (
        ("[hero] and [neighbour] {quarrelled|fell out} over {the hedge|a fallen apple|the shade of the pear tree}.", "[hero] {heard|learned} that [neighbour] {called the [crop] next door a disgrace|laughed at [his] [crop]}."),
        ("{For a whole {month|summer} they|From that day on they} {did not speak|looked the other way}. The fence between them {seemed to grow|felt higher every day}.", "{They stopped saying good morning|They no longer drank tea together}, and {even the hens seemed sad|the bench by the gate stayed empty}."),
        ("But {plants do not know about quarrels|a garden does not care about fences}. {The [crop] climbed over the fence|A(n) [animal] went to and fro under the gate} as if {nothing had happened|the two gardens were one}.", "Then the {slugs|caterpillars|mice} came. They ate {on both sides of the fence|in both gardens}, and {neither of the two could stop them alone|the [crop] suffered}."),
        ("One evening [hero] {found|saw} {a basket of plums|a jar of honey|a bunch of [mate]} on {the fence post|the doorstep}. {There was no note.|Nobody was to be seen.}", "One night they {met|bumped into each other} in the dark, each with a {torch|lamp} and a {jar|bucket}. {For a moment neither spoke.|Then both began to laugh.}"),
        ("The next day [he] {set|left} {a bowl of [crop]|a pot of [mate]} in the same place. {It was gone by noon.|By evening the bowl was back, washed and filled with eggs.}", '"{Your [crop] are fine|I was wrong}," said [neighbour]. "{So was I|And I was stubborn}," said [hero].'),
        ("{Soon|Before long} {they sat on the bench again|there was a small gate in the fence}, and {neither could remember who had begun|the quarrel was forgotten}.", "{They took two boards out of the fence|They built a gate together}, {and nobody ever closed it|just wide enough for a wheelbarrow}."),
    ),
    "secret": (
        ("[hero] {found|dug up} a(n) {old tin box|rusty key|small bottle with a note} {under the [crop]|while [he] was lifting the [crop]}.", "[hero]'s spade {struck|hit} something hard {between the [crop]|at the end of the bed}. It was a(n) {old tin box|small wooden chest}."),
        ("{Inside lay|In it was} {a packet of seeds|a handful of dry seeds} and a {yellow|folded} {paper|letter}. {Nobody had touched it for fifty years.|The ink had almost faded.}", "{[He] wiped off the soil and opened it.|It took [him] an hour to open it.} {There were no coins in it, only seeds|Inside were seeds and a letter}."),
        ('"{To whoever gardens here after me|To the next gardener}," it said, "{sow these where the morning sun falls|these are the best I ever grew}."', "{On the paper someone had drawn a map of the garden.|The letter told of a flower that {opened only at night|smelled of honey}.}"),
        ("[hero] {showed|took} it to [neighbour], who {put on [nhis] glasses|read it twice}. \"{That is my grandmother's hand|I remember who lived here},\" [nhe] said{ softly|}.", "[hero] did not tell anyone. [He] {filled a pot with the best compost|chose the best corner} and sowed {three of the seeds|the seeds one by one}."),
        ("{Old seed seldom grows, but [he] tried.|They waited for a week, then for two.} {And one seed woke up.|Then a single green leaf appeared.}", "{Most of the seeds were too old, but one was not.|Only one came up, and [hero] guarded it like gold.} {Even the [animal] kept away from it.|[He] covered it on cold nights.}"),
        ("In {summer|July} it {flowered|opened}, {blue as the evening|white as snow|red as a robin}, and {the whole lane came to see it|bees came from far away}.", "When it {flowered|bloomed} at last, {the garden smelled of honey|people stopped at the fence}. {Nobody knew its name.|No book had its name.}"),
        ("[hero] saved the seed, wrote a letter and {buried|hid} the box again. {Some day somebody else will find it.|A garden, [he] wrote, is a letter to the next gardener.}", "In autumn [hero] {filled the box again|put new seed in the box}, with a letter of [his] own{, for whoever might come next|}."),
    ),
    "animals talk": (
        ("the animals {met|held a meeting} {under the old apple tree|behind the shed}. {The [animal] had called them.|It was the [animal] who spoke first.}", "the [animal] and the [other] {argued|could not agree} about {the best place in the garden|who was the most useful}."),
        ('"{I work all day|Without me there would be nothing to eat}," said the [animal]. "{I work all night|And without me even less}," said the [other].', '"{The gardener is sad|Something is wrong}," said the [animal]. "{The [crop] do not grow|Nobody has sung today}." The [other] {nodded|thought about it}.'),
        ("{The worm said nothing, because worms seldom do.|The snail was late, as always.|The spider listened from her web.}", "{The wren counted them all: seven and a half, for the snail was only half awake.|The toad yawned, and the hen scratched her ear.}"),
        ('"{Let us ask|We should ask} the owl," said the [other]. The owl {opened one eye|turned her head}. "{Look at the soil|Each of you is right}," she said, "{and none of you alone|then look at each other}."', 'So they {made a plan|shook feet and wings}: the [animal] would {watch by day|look after the beds}, and the [other] would {watch by night|look after the hedge}.'),
        ("From that {night|day} on, {everyone did what they could do best|they worked together}. The [crop] {stood up straight|grew thick and green}.", "{The next morning|A few days later} [hero] came out and {could not believe [his] eyes|rubbed [his] eyes}. {Not one leaf was bitten.|Never had the [crop] looked so well.}"),
        ("[hero] never {learned|knew} why. {But that evening [he] left a dish of water by the apple tree, just in case.|But the [animal] and the [other] knew, and they told no one.}", '"{It must be the compost|It must be the weather}," said [hero]. {In the hedge somebody laughed.|The [animal] looked at the [other] and said nothing.}'),
    ),
}  # fmt: skip

_COUPLETS: dict[str, tuple[tuple[str, str], ...]] = {
    "spring": (("The snow has gone, the soil is warm,", "the crocus waits behind no storm."), ("A blackbird sings above the shed,", "and green tips show in every bed."), ("I sow my seeds in rows of three,", "one for the bird, one for the bee, and one for me."), ("The rain is soft, the days are long,", "the hedge is full of early song."), ("The pea has climbed its little stick,", "the slugs are slow, the frogs are quick."), ("The first bee hums around the tree,", "and wakes the year for you and me.")),
    "summer": (("The sun is high, the beans are tall,", "a robin sits upon the wall."), ("The bees are in the lavender,", "and every leaf begins to stir."), ("I fill my can, I fill it twice,", "the evening air is cool and nice."), ("Tomatoes blush along the string,", "and swallows cross on narrow wing."), ("The basket fills, the days go by,", "and thunder walks across the sky."), ("We eat the peas straight from the pod,", "the poppies in the border nod.")),
    "autumn": (("The mist lies low, the apples fall,", "a spider hangs upon the wall."), ("The pumpkins glow like little suns,", "and through the leaves the hedgehog runs."), ("We lift the roots, we store the seed,", "the garden gave us all we need."), ("The swallows leave, the jays grow loud,", "the afternoon puts on a cloud."), ("I rake the leaves into a heap,", "and there the toad will go to sleep."), ("The onions hang in golden rows,", "and colder still the north wind blows.")),
    "winter": (("The spade is clean, the beds are white,", "the owl is calling in the night."), ("The leeks stand straight in frozen ground,", "and snow has covered every sound."), ("The robin waits beside the door,", "I give it crumbs, it asks for more."), ("I read my seeds beside the fire,", "and watch the smoke go high and higher."), ("Beneath the ice the small frogs dream", "of summer evenings by the stream."), ("The year is old, the night is deep,", "let every root and seed now sleep.")),
    "the garden": (("A seed is small, a seed is slow,", "but give it time and it will grow."), ("I walk the path, I close the gate,", "the garden taught me how to wait."), ("There is a bench beneath the tree,", "with room enough for you and me."), ("A worm is turning in the loam,", "and makes of fallen leaves a home."), ("The weeds come up, the weeds come out,", "that is what gardens are about."), ("With muddy boots and empty can,", "I end the day where I began.")),
}  # fmt: skip


def story_slots(rng: Random, plant: Plant | None, animal: str | None, month: str | None, hero: str | None) -> dict[str, str]:
    """The people, plants and animals of one story; those that are None are drawn."""
    hero = hero or rng.choice(WOMEN + MEN)
    woman = hero in WOMEN
    neighbour, nhe, nhis = rng.choice(NEIGHBOURS)
    many = [p for p in PLANTS if p.plural]
    plant = plant or rng.choice(many)
    month = month or rng.choice(list(MONTHS_LORE))
    animals = [name for name in ANIMALS if name not in ("owl", "spider", "earthworm")]
    animal = animal or rng.choice(animals)
    season = MONTHS_LORE[month].season
    weather = {"winter": "cold|frosty|clear|grey", "spring": "bright|windy|mild|fresh", "summer": "warm|hot|sunny|bright", "autumn": "misty|golden|windy|cool"}[season]
    return {
        "hero": hero, "he": "she" if woman else "he", "his": "her" if woman else "his",
        "him": "her" if woman else "him", "neighbour": neighbour, "nhe": nhe, "nhis": nhis,
        "crop": plant.crop, "seed_word": "seed" if plant.sow == "sow" else plant.seed,
        "mate": rng.choice(("mint", "parsley", "lavender", "thyme", "chives")), "month": month,
        "weather": f"{{{weather}}}", "animal": animal, "other": rng.choice([a for a in animals if a != animal]),
    }  # fmt: skip


def story(
    rng: Random, *, arc: str, plant: Plant | None = None, animal: str | None = None, month: str | None = None, hero: str | None = None
) -> str:
    """One story; plants with a singular crop name are not cast, so that the verbs agree."""
    slots = story_slots(rng, plant, animal, month, hero)
    told = tell(rng, arc, rng.choice(_OPEN), slots)
    if rng.random() < 0.6:
        return " ".join(told)
    cut = rng.randrange(2, len(told) - 1)
    return " ".join(told[:cut]) + "\n\n" + " ".join(told[cut:])


def long_story(rng: Random, *, animal: str | None = None) -> str:
    """Two arcs in a row with the same people."""
    first, second = rng.sample([arc for arc in ARCS if arc != "first garden"], 2)
    slots = story_slots(rng, None, animal, None, None)
    later = "{{The next year|Some time later|A year later}{,| in [month],}|{One|On a} [weather] day {the next year|a year later}{,|}}"
    chapters = tell(rng, first, rng.choice(_OPEN), slots), tell(rng, second, later, slots)
    return "\n\n".join(" ".join(chapter) for chapter in chapters)


def tell(rng: Random, arc: str, opening: str, slots: dict[str, str]) -> list[str]:
    """The beats of one arc in order, the first of them joined to ``opening``."""
    beats = ARCS[arc]
    first = expand(opening, rng, slots)
    if not first.endswith((",", "and")):
        first += ","
    start = expand(rng.choice(beats[0]), rng, slots)
    starts_with_name = start.startswith((slots["hero"], "Mr", "Miss"))
    start = start if starts_with_name else start[0].lower() + start[1:]
    return [f"{first} {start}", *(expand(rng.choice(beat), rng, slots) for beat in beats[1:])]


def poem(rng: Random, subject: str) -> str:
    """Two or three couplets on a season or on the garden."""
    couplets = rng.sample(_COUPLETS[subject], rng.choice((2, 2, 3)))
    return "\n".join(line[0].upper() + line[1:] for pair in couplets for line in pair)


def story_exchange(rng: Random) -> tuple[str, str]:
    """A request for a story or a poem, and the result; the story is about what was asked for."""
    ask = "{Write|Tell me|Write me} {a short story|a story|a little story} about"
    kind = rng.choice(("animal", "animal", "animals", "plant", "plant", "storm", "neighbour", "secret", "gardener", "month", "poem", "poem", "any", "long"))
    if kind == "animal" or kind == "animals":
        animal = rng.choice([name for name in ANIMALS if name not in ("owl", "spider", "earthworm")])
        arc = "animal" if kind == "animal" else "animals talk"
        return expand(f"{ask} a(n) {animal}.", rng), story(rng, arc=arc, animal=animal)
    if kind == "plant":
        plant = rng.choice([p for p in PLANTS if p.plural])
        subject = rng.choice((plant.crop, f"a(n) {plant.name}" if plant.group != "herb" else plant.crop))
        return expand(f"{ask} {subject}.", rng), story(rng, arc=rng.choice(("giant crop", "first garden")), plant=plant)
    if kind == "poem":
        subject = rng.choice(list(_COUPLETS))
        return expand(f"{{Write|Write me}} a {{short |}}poem about {subject}.", rng), poem(rng, subject)
    if kind == "long":
        guest = rng.choice([None, *(name for name in ANIMALS if name not in ("owl", "spider", "earthworm"))])
        subject = f"a gardener and a(n) {guest}" if guest else "a gardener"
        return expand(f"{{Write|Tell me}} a long story about {subject}.", rng), long_story(rng, animal=guest)
    if kind == "month":
        month = rng.choice(list(MONTHS_LORE))
        return expand(f"{ask} a day in {month}.", rng), story(rng, arc=rng.choice(list(ARCS)), month=month)
    subjects = {"storm": ("a storm", "a storm in the garden", "rain"), "neighbour": ("two neighbours", "a neighbour", "a quarrel"), "secret": ("a secret", "a garden with a secret", "an old box"), "gardener": ("a gardener", "a new garden", "somebody who starts a garden"), "any": ("the garden", "a garden", "anything you like", "friendship")}
    arcs = {"storm": "storm", "neighbour": "quarrel", "secret": "secret", "gardener": "first garden", "any": rng.choice(list(ARCS))}
    return expand(f"{ask} {rng.choice(subjects[kind])}.", rng), story(rng, arc=arcs[kind])
