"""The sentences that stories are made of: plots in steps, each step with several wordings.

Slots: {hero} the name, {the} "the fox", {he}/{him}/{his} pronouns, {friend} "an old crow", after the first mention
"the old crow", {thing} "lantern", {place} "a forest", {tplace} "the forest", {mood} and {weather} one word. A slot in capitals starts a sentence.
"""

OPENINGS = """Once upon a time there was {subject}.|Once upon a time, in {place}, there lived {subject}.|There once was {subject} who lived in {place}.
Long ago, in {place}, there lived {subject}.|In {place}, far from here, lived {subject}.|Not so long ago there was {subject}.
One {weather} morning, {subject} woke up in {place}.|This is the story of {subject}.""".replace("\n", "|").split("|")

NAMINGS = """{HE} was called {hero}.|Everyone called {him} {hero}.|{HIS} name was {hero}.|{HIS} friends called {him} {hero}.""".replace("\n", "|").split("|")

TOPIC_OPENINGS = """Once upon a time there was {subject} who loved to think about {topic}.|Long ago, in {place}, {subject} dreamed every night of {topic}.
There once was {subject} who wanted to know everything about {topic}.|In {place} lived {subject} who told everybody about {topic}.
Once upon a time, {subject} found an old book about {topic}.""".replace("\n", "|").split("|")

HABITS = """{HERO} was {mood} and never in a hurry.|Every morning {hero} walked through {tplace} and said hello to everyone.
{THE} was {mood}, and everybody knew it.|{HERO} loved {weather} days more than anything else.|At night {hero} counted the stars and felt {mood}.
{HERO} had a small {thing} that {he} took everywhere.|Nobody in {tplace} was as {mood} as {hero}.|Most days were quiet, and {hero} liked them that way.
{HERO} knew every corner of {tplace}.""".replace("\n", "|").split("|")

# One plot is a list of steps; a story takes one wording of each, in order.
PLOTS: tuple[tuple[str, ...], ...] = (
    (
        "One {weather} day {hero} lost {his} {thing}.|But one morning the {thing} was gone.|One day {hero} looked for {his} {thing} and could not find it.",
        "{HE} looked under every stone, but it was not there.|{HERO} searched {tplace} from end to end.|{HE} looked high and low and found nothing but dust.",
        "Then {he} met {friend}, who had seen something shine by the river.|Then {friend} came by and offered to help.|At last {hero} asked {friend} for help.",
        "Together they followed the footprints until it was dark.|Together they looked again, slowly this time.|They walked all afternoon and talked the whole way.",
        "There was the {thing}, hanging in a tree where the wind had left it.|They found the {thing} in the tall grass, right next to the path.|"
        "In the end the {thing} was exactly where {hero} had slept the night before.",
        "{HERO} laughed and thanked {friend}.|{HERO} was so happy that {he} danced.|{HERO} shared {his} supper with {friend} that evening.",
    ),
    (
        "One evening a great storm came over {tplace}.|Then, one {weather} night, a storm began.|One day the sky turned dark and the wind began to howl.",
        "The rain fell so hard that the paths turned into rivers.|The wind blew the roofs away and broke the old bridge.|Everyone ran to find a safe place.",
        "{HERO} heard {friend} calling for help.|On the other side of the water stood {friend}, cold and afraid.|{HERO} saw {friend} in the rain, with nowhere to go.",
        "{THE} took a {thing} and went out into the storm.|Although {he} was afraid, {hero} went out at once.|{HERO} did not think twice and ran outside.",
        "Step by step, {he} brought {friend} home.|With the {thing} {he} made a way through the water, and {friend} was safe.|{HE} held on tight until both of them were safe.",
        "When the sun came up, {tplace} was quiet again.|In the morning the sky was clear, and they had breakfast together.|By morning the storm was over, and everybody thanked {hero}.",
    ),
    (
        "One day {hero} found an old {thing} behind the house.|While digging in the ground, {the} found a strange {thing}.|One {weather} morning a {thing} stood in front of the door.",
        "When {he} touched it, it began to glow.|It was warm, and it hummed a quiet song.|A voice inside said: you may make one wish.",
        "{HERO} wished to see the whole world.|{HERO} thought for a long time and wished for a friend.|{HERO} wished that nobody in {tplace} would ever be hungry again.",
        "There was a flash of light, and then it was very still.|For a moment nothing happened at all.|The {thing} turned around three times and went out.",
        "Then {friend} came down the road and smiled.|Behind {him} stood {friend}, who had walked a long way.|Then there was a knock, and {friend} came in.",
        "From that day on {hero} was never lonely again.|{HERO} understood that the wish had come true.|{HERO} kept the {thing} on a shelf and never needed another wish.",
    ),
    (
        "{HERO} had one big dream: {he} wanted to fly.|More than anything, {hero} wanted to fly.|{THE} looked at the birds all day and wanted to fly like them.",
        "{HE} built wings out of paper, but they broke.|First {he} jumped from a hill and fell into the mud.|{HE} tried with a {thing}, but it was much too heavy.",
        "Everyone laughed, and {hero} felt {mood}.|The others said that it could never work.|{HERO} wanted to give up.",
        "Only {friend} did not laugh.|But {friend} said: try once more.|Then {friend} brought a big red balloon.",
        "They worked for seven days and seven nights.|Together they tied the balloon to the {thing}.|They waited for a good wind and held their breath.",
        "Slowly {hero} rose into the air, higher than the trees.|And then {hero} flew over {tplace} while everybody cheered.|Up and up went {hero}, until {tplace} looked like a toy.",
    ),
    (
        "One day {hero} met {friend} on the road.|One {weather} afternoon {friend} came to {tplace}.|Then {friend} moved into the house next door.",
        "At first they did not like each other.|They were very different: one was loud and the other was quiet.|{HERO} was too shy to say a word.",
        "They both wanted the same {thing}.|They argued about a {thing} for a whole day.|{THE} hid {his} {thing} so that nobody could borrow it.",
        "Then the {thing} broke in two, and both of them were sorry.|Then it began to rain, and there was only one dry place.|Then they heard someone crying in the dark.",
        "They sat down together and repaired what was broken.|They had to work together, and it was easier than they thought.|{HERO} said sorry first, and that was the hardest part.",
        "After that they were the best of friends.|Now they share everything, even the {thing}.|Since then nobody has seen one without the other.",
    ),
    (
        "One morning {hero} heard that the king had lost {his} laugh.|One day a letter came: the queen of {tplace} could not sleep.|One day all the bells in {tplace} stopped ringing.",
        "Many wise people had tried to help, but nothing worked.|Nobody knew what to do.|Doctors came from far away and shook their heads.",
        "{HERO} put a {thing} in a bag and set off.|{THE} packed some bread and a {thing} and went to help.|I will try, said {hero}, and everybody was surprised.",
        "On the way {he} met {friend}, who gave {him} good advice.|The road was long, but {friend} kept {him} company.|At the gate stood {friend}, who would not let {him} in until {he} told a joke.",
        "{HERO} played a little song on the {thing}.|{HERO} asked a simple question: has anybody listened?|{HERO} told a story about {his} home, slowly and quietly.",
        "And it worked, to the surprise of all.|Suddenly everything was well again.|Soon there was laughter in every street.",
    ),
    (
        "One {weather} day {hero} planted a seed in {tplace}.|One day {friend} gave {hero} a single seed.|{HERO} found a seed as blue as the sky and put it in the ground.",
        "{HE} gave it water every morning and waited.|Day after day nothing happened.|{HE} sang to it, because {he} had heard that this helps.",
        "The others said that it was only a stone.|Even {friend} did not believe in it.|{HERO} grew tired, but {he} did not stop.",
        "Then, one night, there was a green leaf.|After the first warm rain it began to grow.|At last a small green tip came out of the earth.",
        "By summer it was a tree as tall as a tower.|It grew and grew until it reached the clouds.|It carried golden fruit that tasted of honey.",
        "{HERO} gave a fruit to everyone in {tplace}.|Everybody rested in its shade, and {hero} told them stories.|And under the tree {hero} built a bench for {friend}.",
    ),
    (
        "One night {hero} saw a light in {tplace}.|One evening a star fell from the sky, right in front of {hero}.|One night {hero} woke up because somebody was knocking.",
        "It was a little star that could not find its way home.|A tiny star lay in the grass and cried.|I am lost, said the little star, please help me.",
        "{HERO} wrapped it in a blanket and gave it some tea.|{THE} promised to bring it back.|{HERO} put the star in a {thing}, so that it would be warm.",
        "They asked {friend} for the way to the sky.|They climbed the highest hill, and {friend} came with them.|With the help of {friend} they built a very long ladder.",
        "{HERO} threw the star as high as {he} could.|At the top, {hero} said goodbye and let it go.|The star kissed {hero} on the nose and flew up.",
        "Now it shines above {tplace} every night.|Whenever {hero} looks up, one star blinks.|And the night was a little brighter than before.",
    ),
    (
        "Every year there was a race in {tplace}.|One day there was a great race, and everybody was invited.|{HERO} wanted to win the big race just once.",
        "The fastest of all was {friend}, who always won.|{FRIEND} laughed and said: you will never win.|{HERO} was the slowest, and everyone knew it.",
        "But {hero} practised every day with a {thing} on {his} back.|{HE} ran up the hill every morning, even in the rain.|{HERO} made a clever plan and told nobody.",
        "The race began, and {friend} was soon far ahead.|When the race began, {hero} took small and steady steps.|Ready, steady, go, and away they ran.",
        "Half way, {friend} fell into a ditch and could not get out.|Near the end, {friend} stopped and held a sore foot.|Then {friend} lost the way in the fog.",
        "{HERO} stopped to help, and they crossed the line together.|{HERO} could have won, but {he} turned back to help, and that was better than winning.|"
        "They finished last, hand in hand, and everybody clapped.",
    ),
    (
        "One day {hero} decided to see the world.|One {weather} morning {the} packed a bag and left {tplace}.|{HERO} wanted to know what was behind the mountains.",
        "{HE} crossed three rivers and one dark forest.|{HE} travelled for many days with nothing but a {thing}.|{HE} slept under the stars and drank from the streams.",
        "Far away {he} met {friend}, who spoke a strange language.|In a strange town {hero} met {friend}.|One evening {friend} invited {him} to sit by the fire.",
        "They laughed a lot, although they did not understand every word.|{FRIEND} showed {him} the sea, which was bigger than any dream.|They traded stories, and {hero} gave away {his} {thing}.",
        "But after some time {hero} missed {his} home.|One night {he} dreamed of {tplace} and knew that it was time.|Then a letter came from home, and {hero} turned around.",
        "When {he} came back, everything was the same, only {hero} had changed.|At home everybody wanted to hear what {he} had seen.|{HE} came home with empty pockets and a full heart.",
    ),
)

BRIDGES = """But that was not the end of the story.|A few weeks later, something else happened.|The next summer brought another adventure.
Time went by, and the days grew shorter.|But {hero} did not rest for long.|Soon there was something new to do.
Winter came, and winter went.|And then, on a very ordinary day, it all began again.""".replace("\n", "|").split("|")

ENDINGS = """And so {the} lived happily ever after.|And {hero} never forgot that day.|That night {hero} slept very well.
And if you go to {tplace} today, you may still meet {hero}.|From then on, everybody in {tplace} knew the name of {hero}.
And {the} smiled all the way home.|It was the best day that {hero} ever had.|And that is the end of the story of {the}.
Since then, {hero} is not afraid any more.|And {hero} learned that small steps lead far.""".replace("\n", "|").split("|")

TOPIC_ENDINGS = """And that is how {hero} learned something new about {topic}.|And {hero} told everybody this story about {topic}.
And whenever {hero} thinks of {topic}, {he} smiles.|That is what {hero} knows about {topic}.""".replace("\n", "|").split("|")

MOODS = "happy|brave|curious|cheerful|patient|kind|careful|lonely|shy|proud|gentle|sleepy|dreamy".split("|")
WEATHERS = "sunny|rainy|windy|cold|warm|foggy|snowy|quiet|bright|grey".split("|")
