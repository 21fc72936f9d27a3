"""What the garden knows besides its plants: months, pests, animals, tools and the reasons for things.

Runs in: anywhere; owns: nothing. Texts may hold templates of ``grammar.py``.
"""

# ruff: noqa: E501 (a template reads best on one line)
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Month:
    """A month in the garden."""

    season: str
    weather: str
    sight: str  # what one sees or hears, a clause
    jobs: tuple[str, ...]  # imperatives


@dataclass(frozen=True)
class Pest:
    """Something that harms plants, always plural or a mass noun as ``plural`` says."""

    plural: bool
    harm: str  # verb phrase in the plural form, verb first
    sign: str
    cures: tuple[str, ...]  # imperatives


@dataclass(frozen=True)
class Animal:
    """A wild neighbour of the gardener."""

    plural_name: str
    helps: str  # verb phrase in the plural form
    home: str
    sign: str  # how to know it is there
    invite: str  # imperative
    winter: str  # what they do in winter, verb phrase


@dataclass(frozen=True)
class Tool:
    """A tool, what it is for and how to keep it."""

    use: str  # "to ..."
    care: str  # imperative
    choose: str  # advice, a sentence


MONTHS_LORE = {
    "January": Month("winter", "cold and still, with frost on most mornings", "a robin sings from the handle of the fork", ("order seeds for the year", "sharpen the tools", "brush snow off the hedges", "feed the birds", "check the stored apples and onions", "draw a plan of the beds")),
    "February": Month("winter", "raw and grey, with the first mild days at the end", "snowdrops open under the hedge", ("clean the pots and trays", "sow peppers on the windowsill", "set seed potatoes in egg boxes to sprout", "prune the apple trees", "spread compost on the empty beds", "mend the fence")),
    "March": Month("spring", "windy and changeable, with sun and hail on the same day", "the first bumblebees visit the crocuses", ("sow tomatoes indoors", "plant onion sets", "rake the seed beds fine", "sow the first carrots under a cover", "weed before the weeds get going", "split the old clumps of chives")),
    "April": Month("spring", "mild and showery, with a risk of frost at night", "blackbirds carry dry grass to the hedge", ("plant the last potatoes", "sow peas in a flat trench", "put up sticks for the peas", "keep a cover ready for frosty nights", "set traps for slugs", "sow courgettes in pots")),
    "May": Month("spring", "bright and soft, with cool nights until the middle of the month", "swallows hunt low over the beds", ("harden off the young plants", "sow runner beans under their canes", "thin the carrots", "draw soil up around the potatoes", "plant out tomatoes after the last frost", "mow the paths")),
    "June": Month("summer", "warm and long, with light until late in the evening", "the lavender hums with bees", ("water early in the morning", "net the strawberries", "pinch out the side shoots of the tomatoes", "hoe between the rows on dry days", "cut the herbs before they flower", "pick the first peas")),
    "July": Month("summer", "hot, with a thunderstorm now and then", "butterflies drift over the cabbages", ("water deeply instead of often", "lift the garlic", "pick courgettes while they are small", "lay mulch around the beans", "sow turnips for autumn", "look under the leaves for caterpillars")),
    "August": Month("summer", "hot and dry, with heavy dew near the end", "wasps find the first fallen plums", ("dry the onions in the sun", "pick beans every second day", "plant new strawberries", "save seed from the best flowers", "feed the tomatoes each week", "ask a neighbour to water while you are away")),
    "September": Month("autumn", "golden and calm, with mist in the mornings", "spiders hang their webs between the bean poles", ("lift the last potatoes", "set tiles under the pumpkins", "sow spinach for late leaves", "pick apples on dry days", "take down the old cucumber vines", "turn the compost")),
    "October": Month("autumn", "cool and wet, with the first frost near the end", "jays carry acorns across the lawn", ("plant garlic", "bring the pumpkins indoors", "rake leaves for leaf mould", "pick the green tomatoes before the frost", "cut back the old bean vines", "leave a pile of twigs for the hedgehog")),
    "November": Month("autumn", "dark and wet, with wind in the bare trees", "starlings gather in the ash tree at dusk", ("dig the empty beds", "plant raspberry canes", "empty the water butt before it freezes", "cover the celery with straw", "clean and oil the tools", "put the last leaves on the heap")),
    "December": Month("winter", "short and cold, with snow on some days", "blue tits hang on the feeder like little bells", ("pull leeks and parsnips when the soil is not frozen", "shake snow off the nets", "wrap the outdoor tap", "put out fat and seed for the birds", "read last year's notes", "rest, because the garden rests too")),
}  # fmt: skip

PESTS = {
    "slugs": Pest(True, "eat young leaves at night", "silver trails and ragged holes", ("go out with a torch after rain and collect them", "water in the morning so that the soil is dry by night", "put a shallow dish of beer at soil level", "make the hedgehogs and frogs welcome")),
    "aphids": Pest(True, "suck the sap from soft shoots", "curled tips and sticky leaves", ("rub them off with your fingers", "wash them off with a jet of water", "wait for the ladybirds, who eat hundreds of them", "plant nasturtiums nearby to draw them away")),
    "whitefly": Pest(False, "suck the sap under the leaves", "a white cloud when you touch the plant", ("hang up yellow sticky cards", "grow marigolds between the plants", "wash the undersides of the leaves with soapy water")),
    "carrot fly": Pest(False, "lay its eggs beside the roots", "rusty tunnels in the roots", ("cover the row with a fine net", "grow onions next to the row", "thin the seedlings in the evening and firm the soil again")),
    "onion fly": Pest(False, "lay its eggs at the base of the leaves", "yellow leaves and soft bulbs", ("plant sets instead of seed", "cover the rows with a fine net", "dig the empty bed over in winter for the birds to search")),
    "mice": Pest(True, "dig up large seeds", "small holes along the row", ("sow in trays indoors and plant out later", "lay prickly twigs over the row", "set the trays on a high shelf")),
    "pigeons": Pest(True, "peck the leaves down to the ribs", "torn leaves and white droppings", ("stretch a net over hoops", "hang up strips that flash in the wind", "plant the bed close to the path where people walk")),
    "birds": Pest(True, "peck at fruit and seedlings", "missing fruit and scattered seedlings", ("stretch a net over hoops", "put a dish of water elsewhere, for they are often only thirsty", "make a scarecrow and move it every week")),
    "caterpillars": Pest(True, "chew the leaves to lace", "round holes and small green droppings", ("look under the leaves for yellow eggs and rub them off", "pick them off by hand and give them to the hens", "cover the bed with a fine net")),
    "flea beetles": Pest(True, "bite tiny holes in young leaves", "leaves like a pepper pot", ("keep the soil moist", "cover the row with a fine net", "sow again when the weather is cooler")),
    "rust": Pest(False, "spot the leaves with orange dust", "orange spots on the leaves", ("pick off the spotted leaves", "give the plants more room and air", "grow the crop in another bed next year")),
    "blight": Pest(False, "turn leaves and stems brown within days", "brown patches after warm wet weather", ("cut off the leaves at once and do not compost them", "water the soil and never the leaves", "choose an early kind that is ripe before it comes")),
    "mildew": Pest(False, "cover the leaves with white powder", "a white dust on the leaves", ("water the roots well, because dry plants suffer most", "cut off the worst leaves", "leave more room between the plants")),
}  # fmt: skip

ANIMALS = {
    "robin": Animal("robins", "pick grubs from the soil that you turn", "low in a hedge or in an old kettle", "a thin sweet song even in winter", "leave a spade standing for it to perch on", "stay and sing on the coldest days"),
    "blackbird": Animal("blackbirds", "turn over the leaves to look for snails and grubs", "in a dense hedge", "a rich song from the roof at dusk", "leave some fallen apples on the grass", "feed on berries and old apples"),
    "blue tit": Animal("blue tits", "feed hundreds of caterpillars to their chicks", "in a nest box with a small hole", "quick blue and yellow wings in the apple tree", "hang up a nest box that faces east", "travel from feeder to feeder in small flocks"),
    "song thrush": Animal("song thrushes", "break snails on a flat stone", "in a thick shrub", "broken snail shells around a stone", "leave a flat stone beside the path", "search the hedges for the last berries"),
    "wren": Animal("wrens", "search every crack for spiders and small insects", "in ivy or in a pile of wood", "a very loud song from a very small bird", "let ivy grow on an old wall", "sleep close together in a nest box to keep warm"),
    "hedgehog": Animal("hedgehogs", "eat slugs and beetles all night", "under a pile of leaves and twigs", "a snuffling sound after dark", "cut a small gap at the bottom of the fence", "sleep in a nest of dry leaves until spring"),
    "frog": Animal("frogs", "catch slugs with their long tongues", "in the damp beside a pond", "a soft plop when you walk past the pond", "sink a basin in the soil and let it fill with rain", "sleep in the mud at the bottom of the pond"),
    "toad": Animal("toads", "eat slugs and ants in the greenhouse", "under an upturned pot with a chipped rim", "two gold eyes under a flowerpot", "leave a broken pot in a shady corner", "sleep under stones and logs"),
    "ladybird": Animal("ladybirds", "eat aphids by the hundred", "in hollow stems and dry leaves", "red wing cases on the bean leaves", "leave the old stems standing until spring", "crowd together in dry cracks"),
    "bumblebee": Animal("bumblebees", "carry pollen between the bean flowers", "in an old mouse hole", "a deep hum on cool mornings", "grow flowers from March to October", "leave only the young queens, who sleep in the soil"),
    "honeybee": Animal("honeybees", "carry pollen from one apple tree to the next", "in a hive at the end of the orchard", "a busy hum in the lavender on warm days", "let some of the thyme flower", "keep warm in a cluster and eat their honey"),
    "butterfly": Animal("butterflies", "visit the flowers and brighten the garden", "among nettles in a sunny corner", "open wings on a warm wall", "leave a patch of nettles behind the shed", "rest as a pupa or sleep in a cold shed"),
    "hoverfly": Animal("hoverflies", "lay their eggs where the aphids are", "among flat open flowers", "a small striped fly that stands still in the air", "grow marigolds between the vegetables", "hide in ivy"),
    "earthworm": Animal("earthworms", "pull leaves into the soil and turn them into crumbs", "in the soil under a layer of mulch", "small curled heaps on the lawn", "spread compost and dig less", "go deeper, where the soil does not freeze"),
    "spider": Animal("spiders", "catch flies and gnats in their webs", "between the bean poles", "a wheel of dew on a misty morning", "leave the webs in the corners of the shed", "hide in the dry corners of the shed"),
    "bat": Animal("bats", "catch thousands of gnats in one night", "under the roof tiles of the barn", "a flicker in the air at dusk", "grow flowers that smell at night", "hang upside down and sleep"),
    "owl": Animal("owls", "catch the mice that dig up the peas", "in a hollow tree", "a long call on a clear night", "leave an old tree standing", "hunt over the snow on silent wings"),
    "hen": Animal("hens", "scratch up grubs and give eggs in return", "in a dry coop behind the shed", "a proud cackle after every egg", "let them into the empty beds in autumn", "lay less and fluff up their feathers"),
}  # fmt: skip

TOOLS = {
    "spade": Tool("to dig, to cut edges and to lift plants with their soil", "wipe the blade clean and oil it before winter", "Choose one whose handle reaches your hip."),
    "fork": Tool("to loosen the soil and to lift potatoes without cutting them", "knock off the soil and straighten the tines", "Choose one that is light enough to use for an hour."),
    "rake": Tool("to make a seed bed fine and level", "hang it up with the teeth to the wall", "Choose a wide head for beds and a narrow one for rows."),
    "hoe": Tool("to cut weeds off just below the surface", "sharpen the edge with a file", "Choose a long handle so that your back stays straight."),
    "trowel": Tool("to set out small plants and to dig up deep weeds", "rinse it and keep it in a bucket of sand with some oil", "Choose one made of a single piece, because it cannot come loose."),
    "watering can": Tool("to give plants a gentle rain", "empty it before the frost so that it does not crack", "Choose two small cans instead of one big one, for balance."),
    "wheelbarrow": Tool("to carry soil, pots and children", "pump up the tyre and oil the axle", "Choose one that you can tip over by yourself."),
    "pair of secateurs": Tool("to cut stems as thick as a pencil", "clean the blades with oil after every use", "Choose a pair with blades that pass each other like scissors."),
    "dibber": Tool("to make deep holes for leeks and beans", "keep it dry so that the wood does not split", "An old spade handle with a point makes a very good one."),
    "cold frame": Tool("to shelter young plants from wind and frost", "wash the glass in spring and autumn", "Choose one with a lid that can be propped open."),
    "water butt": Tool("to keep the rain from the roof for dry days", "scrub it out once a year", "Choose one with a lid, so that no bird falls in."),
    "garden line": Tool("to draw straight rows", "roll it up dry", "Two sticks and a piece of string will do."),
}  # fmt: skip

WHYS = (
    ("should I water in the morning", "in the morning the soil is still cool, so the water reaches the roots before the sun can take it. The leaves dry quickly too, which keeps mildew and slugs away"),
    ("should I rotate my crops", "each family of plants takes the same food from the soil and draws the same pests. If you move it to another bed each year, the soil can recover and the pests lose their way"),
    ("do gardeners use mulch", "a layer of mulch keeps the soil moist, stops weeds and feeds the worms. It also keeps the rain from beating the soil flat"),
    ("is compost so good", "compost feeds the soil instead of only the plant. It holds water in sand, opens up clay and gives the worms something to do"),
    ("do my seedlings fall over", "they were probably too warm, too dark or too wet. Give them light from above, fresh air and less water, and sow the next ones more thinly"),
    ("do seedlings grow long and pale", "they are reaching for the light. Put them on the brightest windowsill, turn them every day and keep them a little cooler"),
    ("do tomatoes split", "they drink too much at once after a dry time. Water them a little every day or two, and the skins will keep up with the fruit"),
    ("does lettuce bolt", "heat, drought and long days tell it to make seed before it dies. Sow it in light shade in summer and water it often"),
    ("do carrots fork", "they met a stone or fresh manure on their way down. Grow them in light soil that was manured for another crop the year before"),
    ("are worms good for the garden", "worms pull leaves into the soil, eat them and leave behind fine crumbs full of food. Their tunnels let in air and rain"),
    ("do leaves turn yellow", "there are several reasons. Old leaves at the bottom are simply done, pale leaves with green veins lack iron, and a whole yellow plant has had too much water or too little food"),
    ("should I leave some weeds", "some weeds feed butterflies and bees, and nettles make a good plant food. A small wild corner brings more friends than enemies"),
    ("do bees matter", "bees carry pollen from flower to flower, and without it there would be no beans, no pumpkins and no apples. A garden full of flowers is a garden full of fruit"),
    ("do I have to harden off young plants", "leaves that grew indoors are soft, and sun and wind would burn them. A week of days outside and nights inside makes them tough"),
    ("should I thin my seedlings", "crowded plants fight for light, water and food, and none of them wins. Fewer plants give more to eat"),
    ("do gardeners dig in autumn", "frost breaks the turned clods into crumbs, and the birds find the grubs. In light soil it is better to leave the ground covered"),
    ("is rain better than tap water", "rain is soft and has the warmth of the air, while tap water is often hard and cold. Most plants grow with either, but seedlings and berries like rain"),
    ("do plants need flowers nearby", "flowers bring the insects that carry pollen and the hunters that eat pests. A row of marigolds does the work of many hands"),
    ("do slugs love my garden", "they like moist soil, soft leaves and places to hide. Water in the morning, lift the boards where they sleep, and invite a hedgehog"),
    ("does frost hurt plants", "the water in the leaves freezes and breaks their cells. A cover of fleece or straw keeps the warmth of the soil around them"),
    ("do I need to save seed", "you do not need to, but saved seed costs nothing and comes from plants that liked your garden. Keep it dry, cool and labelled"),
    ("do birds sing at dawn", "the air is still and carries far, and it is too dark to look for food. So they use the time to tell the others whose garden it is"),
    ("is clay soil hard to work", "its grains are tiny and lie close together, so it holds water and bakes hard in the sun. Compost every autumn opens it up bit by bit"),
    ("do leaves fall in autumn", "the tree draws the food out of them and lets them go before the frost. On the ground they turn into leaf mould, the best blanket a bed can have"),
)

TIPS = {
    "watering": ("Water the soil and not the leaves.", "One deep watering is better than three light ones.", "Push a finger into the soil; if the tip stays dry, it is time to water.", "Sink a flowerpot beside each thirsty plant and pour the water into it."),
    "weeding": ("Hoe on a dry morning, and the sun will finish the work.", "Pull weeds after rain, when the roots slide out.", "Never let a weed set seed, because one year of seed is seven years of weeds.", "Cover empty soil with mulch and the weeds will not find it."),
    "compost": ("Mix green things with brown ones, about half and half.", "If the heap smells, add dry leaves or torn cardboard.", "If the heap is dry, give it a can of water and turn it.", "Keep the heap in the shade and cover it with an old carpet."),
    "sowing": ("Sow thinly, for a seed is stronger alone than in a crowd.", "Write a label before you sow and not after.", "Water the drill before you sow, and cover the seed with dry soil.", "Sow a little and often instead of all at once."),
    "small gardens": ("Grow upwards: beans and cucumbers need only a hand of soil.", "Choose crops that you can pick for weeks, such as chard and chives.", "Sow radishes between slow crops.", "A bucket with holes is a fine bed for one tomato plant."),
    "beginners": ("Start with a bed that you can reach across.", "Grow what you like to eat.", "Begin with radishes, lettuce and courgettes, for they forgive almost everything.", "Keep a notebook, because next year you will not remember."),
    "winter": ("Feed the birds and they will stay for the caterpillars.", "Oil the tools on a rainy day.", "Leave the old stems standing, because the ladybirds sleep in them.", "Order your seeds early while the choice is large."),
    "pots": ("A big pot dries out more slowly than a small one.", "Put a saucer under each pot in hot weather.", "Feed plants in pots every week in summer.", "Lift pots onto small feet so that the water can run out."),
    "soil": ("Feed the soil and it will feed the plant.", "Never walk on a bed when it is wet.", "Cover bare soil before winter.", "Dig as little as you can and mulch as much as you can."),
    "wildlife": ("Leave a pile of twigs in a quiet corner.", "Keep a shallow dish of water with a stone in it.", "Let a few herbs flower for the bees.", "Cut a small gap in the fence for the hedgehog."),
}

HOWTOS = {
    "make compost": ("{Choose|Find} a shady corner {and mark out|of} a square metre", "Start with a layer of twigs so that air can get in", "Add kitchen peelings, grass and old flowers", "Cover them with {dry leaves|straw|torn cardboard}", "Keep the heap as moist as a wrung cloth", "Turn it with a fork {once a month|every few weeks}", "Use it after {six months|half a year}, when it is dark and smells of the woods"),
    "sow seeds indoors": ("Fill a tray with fine seed compost", "Water it and let it drain", "{Scatter|Lay} the seeds thinly on top", "Cover them with {a little|a thin layer of} compost", "Write a label", "Keep the tray warm and {bright|light}", "Move each seedling to its own pot when it has two true leaves"),
    "plant out seedlings": ("Put the seedlings outside by day for a week", "Choose a cloudy day or an evening", "Water the pots {well|first}", "Make a hole {with a trowel|a little larger than the pot}", "Set each plant as deep as it stood before", "Press the soil gently with your hands", "Water again and keep an eye on the slugs"),
    "prepare a new bed": ("Mark the edges with {string|a line and two sticks}", "Lay cardboard over the grass", "Wet the cardboard {well|until it is soft}", "Cover it with a hand's depth of compost", "Plant strong young plants straight into it", "Keep the edges clean with a spade"),
    "save seed": ("Choose the best plant and not the first", "Let the seed ripen {and dry|until it is dry} on the plant", "Cut the heads on a dry day", "Rub the seeds out over a {bowl|sheet of paper}", "Blow away the dust", "Put them in a paper bag with the name and the year", "Keep the bag in a cool dry place"),
    "make leaf mould": ("Rake up the leaves on a damp day", "Put them in a {wire cage|sack with some holes}", "Press them down {with your feet|firmly}", "Keep them moist", "Wait for a year", "Spread the dark crumbs around your plants"),
    "water in dry weather": ("Water early in the morning", "Pour the water at the roots", "Give each plant a lot at once", "Wait until the soil is dry again a finger deep", "Cover the damp soil with mulch"),
    "build a bean wigwam": ("Push {eight|six} long canes into the soil in a circle", "Tie the tops together with string", "Wind string around the canes for the plants to hold", "Sow two beans at the foot of each cane", "Take away the weaker one", "Water well when the flowers open"),
    "store onions": ("Wait until the leaves have fallen over", "Lift the bulbs {with a fork|on a dry day}", "Let them dry in the sun for two weeks", "Rub off the loose skins", "Tie them in a plait or lay them in a net", "Hang them in a cool dry shed"),
    "make a small pond": ("Sink an old basin into the soil", "Put a few stones in one corner as stairs", "Let it fill with rain", "Add one water plant", "Leave the grass around it long", "Wait for the frogs, for they will come by themselves"),
    "test my soil": ("Take a handful of moist soil", "Roll it between your palms", "If it falls apart, it is sand and needs compost", "If it makes a shiny sausage, it is clay and needs compost and patience", "If it makes a crumbly ball, it is loam and you are lucky"),
    "harden off young plants": ("Put them outside in the shade for an hour on the first day", "Give them a little longer every day", "Bring them in at night for a week", "Leave them out on a mild night", "Plant them when the last frost has passed"),
    "make plant food from nettles": ("Put on gloves and cut a bucket of young nettles", "Cover them with rain water", "Put on a lid, because it smells", "Stir it every few days for two weeks", "Mix one cup with ten cups of water", "Pour it at the roots of hungry plants"),
    "prune an apple tree": ("Choose a dry day in winter", "Clean the blades {well|first}", "Cut out dead and broken wood", "Take away branches that cross or rub", "Open the middle so that a bird could fly through", "Stop when a quarter is gone, and leave the rest for next year"),
    "build an insect hotel": ("Find a dry wooden box", "Fill it with hollow stems and dry sticks", "Drill small holes in a log and put it in too", "Close the gaps with pine cones and straw", "Hang it on a sunny wall out of the rain", "Leave it in peace, and the bees will move in"),
    "keep slugs away": ("Water in the morning instead of the evening", "Lift boards and pots and collect the slugs that sleep there", "Put a dish of beer at soil level", "Protect young plants with a cut bottle", "Make hedgehogs, frogs and thrushes welcome"),
}  # fmt: skip

SOILS = {
    "clay": ("heavy and sticky when wet and hard when dry", "it holds a lot of food and water", "Add compost each autumn and never walk on it when it is wet", ("cabbages", "broad beans", "potatoes")),
    "sand": ("light, warm and quick to dry", "it is easy to dig and early to warm up", "Add compost often, water well and keep it covered with mulch", ("carrots", "parsnips", "thyme")),
    "loam": ("dark, crumbly and sweet to smell", "it holds water and still lets it drain", "Keep it as it is with a layer of compost each year", ("tomatoes", "onions", "cabbages")),
    "chalk": ("pale, stony and quick to drain", "it never stays wet for long", "Add plenty of leaf mould and choose plants that like lime", ("kale", "lavender", "spinach")),
}
