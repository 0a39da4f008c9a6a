"""The phrase banks of tldr_mini: slot values and sentence templates. Pure data, no logic.

Two rules keep the gold score unambiguous (tests/data/test_tldr_mini.py checks both):
the values of all slots are disjoint as word sequences, and no fixed text contains a value.

Placeholders are the slots' names and what posts.py derives from them: `{where}` is the place
with its preposition ("in the kitchen"), `{she}`, `{her}`, `{hers}` the pronouns ("her" is the object
form, "hers" the possessive), `{subject}` the name or the pronoun, whichever is clear at that point.
Templates start in lower case. The first letter of a sentence is capitalised when the text is put together.
"""

# --- Slot values ------------------------------------------------------------------------------------

# relation: (gender of the person or None, youngest, oldest)
RELATIONS = {
    "sister": ("f", 16, 45), "brother": ("m", 16, 45), "mother": ("f", 40, 70), "father": ("m", 40, 70),
    "aunt": ("f", 30, 68), "uncle": ("m", 30, 68), "grandmother": ("f", 58, 70), "grandfather": ("m", 58, 70),
    "daughter": ("f", 16, 32), "son": ("m", 16, 32), "niece": ("f", 16, 30), "nephew": ("m", 16, 30),
    "girlfriend": ("f", 18, 40), "boyfriend": ("m", 18, 40), "wife": ("f", 21, 64), "husband": ("m", 21, 64),
    "roommate": (None, 18, 40), "boss": (None, 28, 66), "neighbour": (None, 18, 70), "cousin": (None, 16, 50),
    "landlord": (None, 30, 70), "coworker": (None, 19, 63), "classmate": (None, 16, 29),
    "teacher": (None, 25, 66),
}

NAMES = {
    "f": "Anna Emma Laura Julia Sarah Maria Nina Clara Helen Alice Olivia Sophie Hannah Lucy Ella Megan "
         "Rachel Diana Karen Monica Linda Susan Carla Paula Vera Tina Rita Irene Martha Judith Amy Kate Eva "
         "Nora Ruth Lena Mia Zoe Jane Sandra".split(),
    "m": "Tom Ben Peter Paul David Daniel Simon Oliver Henry George Lucas Adam Martin Oscar Victor Leo Max "
         "Felix Jack Sam Kevin Brian Eric Robert Andrew Philip Walter Edward Alan Colin Derek Ivan Luke Noah "
         "Ryan Steve Greg Carl Hugo Jonas".split(),
}

# action: what it can be done to
ACTIONS = {
    "broke": "hard", "scratched": "hard", "cracked": "hard", "bent": "hard", "smashed": "hard",
    "kicked": "hard", "dented": "hard", "ripped": "soft",
    "lost": "any", "sold": "any", "hid": "any", "borrowed": "any", "stained": "any", "dropped": "any",
    "stole": "any", "ruined": "any", "burned": "any", "soaked": "any", "damaged": "any", "pawned": "any",
}

OBJECTS = {
    **dict.fromkeys(
        "lamp guitar bike laptop camera mirror kettle blender vase teapot radio tablet printer keyboard "
        "violin drum flute scooter helmet telescope typewriter toaster heater speaker globe necklace "
        "bracelet suitcase toolbox ladder drill hammer mug bowl trophy console racket sled kayak tripod "
        "stool umbrella".split(), "hard"),
    **dict.fromkeys(
        "jacket coat dress scarf sweater blanket pillow backpack tent carpet curtain notebook diary album "
        "wallet quilt hat shirt".split(), "soft"),
}

PLACES = {
    **dict.fromkeys(
        "kitchen garage library garden bathroom bedroom basement attic hallway cafe restaurant museum "
        "theatre hotel hospital supermarket bakery lobby cinema barn workshop courtyard cellar elevator "
        "classroom".split(), "in"),
    **dict.fromkeys("station gym airport beach campsite stadium harbour".split(), "at"),
    **dict.fromkeys("balcony porch terrace farm".split(), "on"),
}

WHENS = [
    *(f"last {day}" for day in "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()),
    "last night", "last week", "last month", "yesterday", "this morning", "this afternoon", "two days ago",
    "three days ago", "two weeks ago", "three weeks ago", "two months ago", "over the weekend",
    "at Christmas", "at Easter", "in March", "in June", "in October",
]

FEELINGS = [
    *("furious hurt angry sad upset confused guilty jealous embarrassed disappointed helpless annoyed "
      "exhausted lonely ashamed nervous betrayed frustrated").split()
]

# question -> advice: what a bystander says one should do; whether: the question as a clause without a person;
# clauses: how a post words it behind a lead-in; asks: how a post words it as a sentence of its own
QUESTIONS = {
    "Should I ask for the money back?": {
        "advice": "ask for the money back",
        "whether": "whether to ask for the money back",
        "clauses": ["whether it is fair to ask for all of the money back",
                    "whether I may ask to get the money back",
                    "if asking for my money back is too much",
                    "whether people ask for the money back in such a case"],
        "asks": ["would you ask to get the money back if you were me?",
                 "is it rude to ask for that money back?"],
    },
    "Should I just let it go?": {
        "advice": "just let it go",
        "whether": "whether to just let it go",
        "clauses": ["whether it would be better to let the whole thing go",
                    "whether I should simply let this go",
                    "if letting it go is the smart thing to do", "whether a wise person would let it all go"],
        "asks": ["would it be better for all of us to just let this go?",
                 "is this where you let a thing go?"],
    },
    "Should I wait for an apology?": {
        "advice": "wait for an apology",
        "whether": "whether to wait for an apology",
        "clauses": ["whether it makes sense to wait for some kind of apology",
                    "how long I should wait for an apology",
                    "if waiting for an apology is a waste of time",
                    "whether I must wait until an apology comes"],
        "asks": ["does it make sense to wait until there is an apology?",
                 "would you wait here for a real apology?"],
    },
    "Should I demand a new one?": {
        "advice": "demand a new one",
        "whether": "whether to demand a new one",
        "clauses": ["whether I have the right to demand that I get a new one",
                    "whether it is mean to demand a new one",
                    "if I can demand a brand new one", "whether to go over there and demand a new one"],
        "asks": ["is it fair of me to demand a brand new one?", "would you go and demand a new one?"],
    },
    "Should I bring it up again?": {
        "advice": "bring it up again",
        "whether": "whether to bring it up again",
        "clauses": ["whether it is a good idea to bring the subject up again",
                    "when I should bring all of it up again",
                    "if bringing it up again only makes it worse", "whether I can bring this up once again"],
        "asks": ["is it a bad idea to bring the thing up again?",
                 "would you bring this up again at the table?"],
    },
    "Should I lock the door from now on?": {
        "advice": "lock the door from now on",
        "whether": "whether to lock the door from now on",
        "clauses": ["whether it is cold of me to lock the door from now on",
                    "whether I need to lock my door every day",
                    "if I had better lock every door from now on",
                    "whether a person should lock the door at home"],
        "asks": ["is it crazy to lock my door every day from now on?",
                 "would you start to lock the door at home?"],
    },
    "Should I tell everyone the truth?": {
        "advice": "tell everyone the truth",
        "whether": "whether to tell everyone the truth",
        "clauses": ["whether it is my job to tell everyone else the truth",
                    "if everyone needs to hear the truth",
                    "whether the time has come to tell them all the truth",
                    "whether telling everyone the truth is fair"],
        "asks": ["do you think everyone ought to hear the truth?", "would you tell all of them the truth?"],
    },
    "Should I keep some distance?": {
        "advice": "keep some distance",
        "whether": "whether to keep some distance",
        "clauses": ["whether it would be good to keep a bit of distance", "how much distance I should keep",
                    "if keeping my distance is the answer",
                    "whether some distance would be good for both of us"],
        "asks": ["would a bit of distance do us good?", "is it cruel to keep a little distance?"],
    },
    "Is it right to forgive this?": {
        "advice": "forgive this",
        "whether": "whether it is right to forgive this",
        "clauses": ["whether anyone could really forgive a thing like this",
                    "if forgiving all this would be right",
                    "whether it would be right of me to forgive it",
                    "whether this is something that people forgive"],
        "asks": ["would you forgive a thing like this?",
                 "can it ever be right to forgive something like this?"],
    },
    "Am I making too much of it?": {
        "advice": "stop making too much of it",
        "whether": "whether this is making too much of it",
        "clauses": ["whether I am making far too much of the whole thing",
                    "if I make too much of such a small thing",
                    "whether other people would make as much of it",
                    "whether it is too much, what I make of it"],
        "asks": ["do I make too much of such a small thing?",
                 "would you say that I make too much of all this?"],
    },
    "How can I trust again?": {
        "advice": "learn to trust again",
        "whether": "how to trust again",
        "clauses": ["how I can ever learn to trust again", "how one gets to trust somebody again after that",
                    "how anyone would trust again after such a thing",
                    "how long it takes to trust a person again"],
        "asks": ["how do people learn to trust after such a thing?",
                 "how would you ever trust such a person again?"],
    },
    "How do I set clear rules?": {
        "advice": "set clear rules",
        "whether": "how to set clear rules",
        "clauses": ["how I could set some rules that are clear to all", "how one sets rules without a fight",
                    "how other people set clear rules at home",
                    "how to make the rules clear without being mean"],
        "asks": ["how would you make the rules clear?", "how do other people set rules that are clear?"],
    },
    "How do I stay calm about it?": {
        "advice": "stay calm about it",
        "whether": "how to stay calm about it",
        "clauses": ["how I am supposed to stay calm about all this", "how anyone could stay calm about it",
                    "how other people manage to stay calm", "how to keep calm when I think about it"],
        "asks": ["how would you stay calm about all that?",
                 "how does one keep calm about a thing like that?"],
    },
    "Should I pretend nothing happened?": {
        "advice": "pretend nothing happened",
        "whether": "whether to pretend nothing happened",
        "clauses": ["whether it is easier to act as if nothing had happened",
                    "how long I can pretend nothing happened",
                    "if I should go on and pretend that nothing happened",
                    "whether to smile and pretend all is well"],
        "asks": ["can I go on and pretend that nothing happened?",
                 "would you pretend that nothing has happened?"],
    },
    "Should I write an honest letter?": {
        "advice": "write an honest letter",
        "whether": "whether to write an honest letter",
        "clauses": ["whether it would help to write a long and honest letter",
                    "whether to put it all in a letter",
                    "if an honest letter would be better than a talk",
                    "whether people still write honest letters"],
        "asks": ["does it help to write a really honest letter?",
                 "would you put all of it in an honest letter?"],
    },
    "Was it wrong of me to shout?": {
        "advice": "say sorry for the shouting",
        "whether": "whether it was wrong to shout",
        "clauses": ["whether it was really so wrong that I began to shout", "if my shouting was wrong",
                    "whether I was wrong when I started to shout", "how wrong it was that I had to shout"],
        "asks": ["was I wrong when I started to shout?", "do you think that my shouting was so wrong?"],
    },
}

# --- Posts ------------------------------------------------------------------------------------------

SUBREDDITS = ["relationships", "relationship_advice", "advice", "needadvice", "offmychest", "family", "tifu",
              "self", "AskReddit", "legaladvice"]

TITLES = [
    "My {relation} and I are not talking any more", "Trouble with my {relation}",
    "My {relation} went too far this time",
    "I need some advice about my {relation}", "Is my {relation} being unfair or am I?",
    "What do I do about my {relation}?",
    "A fight with my {relation} over a small thing", "My {relation} does not get it",
    "Something happened to my {object}", "All this because of a {object}?", "The story of my {object}",
    "My favourite {object} and a very bad day", "I cared a lot about my {object}",
    "It is only a {object}, people say",
    "What would you do in my place?", "I don't know what to do any more", "Small thing, big fight",
    "Need an honest opinion on this", "How would you handle this?", "Please tell me that I'm not crazy",
    "A long story about a stupid thing", "It was mine and now look at it", "Help me think clearly about this",
    "Not sure who is right here", "This has been on my mind for days",
    "Am I the only one who thinks this is not okay?",
]

OPENERS = [
    "this is my first post here, so please be kind.", "long time reader, first time writer.",
    "sorry if this is a bit long.", "I am on mobile, so sorry for any mistakes.",
    "I never thought I would write something like this.", "I need to get this off my chest.",
    "okay, so this is a strange one.", "I really need some advice from people who don't know us.",
    "it sounds silly, but I can't stop thinking about it.", "I will try to keep this short.",
    "I don't have many people to talk to, so here I am.", "English is not my first language, sorry.",
    "hello everyone, I hope this is the right place to ask.", "maybe some of you have been through the same.",
    "throwaway account for obvious reasons.", "let me start at the beginning.",
    "I have read a lot of posts here and now I have my own story.",
    "I have changed no names because I don't care.",
    "some background first.", "I could use a second opinion.", "where do I even start?",
    "it has been a difficult time for me.", "I know that other people have bigger problems.",
    "I have been going back and forth about posting this.", "so here is my little drama.",
    "please read to the end before you judge me.", "my head is spinning, so bear with me.",
    "I am usually a calm person.", "things at home are tense right now.", "I hardly slept because of this.",
    "nobody in my family wants to hear about it any more.", "I guess every family has stories like this.",
    "normally I would keep this to myself.", "I wish I were making this up.",
    "it started as a normal day.", "this is going to sound petty.", "I am trying to be fair to both sides.",
    "this may be the wrong place, but I will try.", "I was not going to post, but here we are.",
    "I typed this three times and deleted it twice.", "you can call me petty, but hear me out.",
    "I just want to hear what strangers think.", "so, where should I begin?", "this one is hard to write.",
    "I have told this story so often that I am tired of it.", "hi all, I hope you can help.",
    "I need a reality check.", "let me know if anything is unclear.",
]

# The person: relation, name, age
INTRODUCTIONS = [
    "my {relation} {name} ({age}) and I have always been close.",
    "this is about my {relation} {name}, who is {age}.",
    "I have a {relation} called {name}, {age} years old.",
    "my {relation} {name} is {age} and should know better.",
    "you need to know that my {relation} {name} is {age}.", "{name} is my {relation} and {age} years old.",
    "the person in question is my {relation} {name} ({age}).", "meet {name}, {age}, my {relation}.",
    "my {relation} is called {name} and is {age}.", "it all began with my {relation} {name} ({age}).",
    "I get along well with my {relation} {name} ({age}) most of the time.",
    "there is my {relation}, {name} ({age}), and there is me.",
    "my {relation} {name} turned {age} this year.",
    "I see my {relation} {name} ({age}) nearly every day.",
    "{name} ({age}) is my {relation}, and it was never easy.",
    "I am writing because of {name} ({age}), my {relation}.", "the trouble is my {relation} {name}, {age}.",
    "my {relation}, let's call {her} {name}, is {age}.", "everybody likes my {relation} {name} ({age}).",
    "I used to trust my {relation} {name} ({age}) with everything.",
    "my {relation} {name} ({age}) is not a bad person.",
    "I have known {name} for years, {she} is my {relation} and {age} now.",
    "with my {relation} {name} ({age}) there is always something.",
    "at {age}, my {relation} {name} still acts like a child.",
]

# What happened, in one sentence: action, object, where, when
EVENTS = [
    "{when} {subject} {action} my {object} {where}.", "{subject} {action} my {object} {where} {when}.",
    "{when}, {where}, {subject} {action} my {object}.",
    "{subject} {action} my {object} {when} when we were {where}.",
    "we were {where} {when} and {subject} {action} my {object}.",
    "{where} {subject} {action} my {object} {when}.",
    "{when} {subject} {action} my {object}, right there {where}.",
    "{subject} {action} my {object} {when}, and that {where} in front of me.",
    "{when} I came in and learned that {subject} {action} my {object} {where}.",
    "I saw with my own eyes how {subject} {action} my {object} {where} {when}.",
    "I learned that {subject} {action} my {object} {where} {when}.",
    "{subject} {action} my {object} {where} {when} and did not say a word.",
    "{subject} {action} my {object} {where}, it was {when}.",
    "{when} {subject} was {where} and {action} my {object}.",
    "{when} {subject} simply {action} my {object} {where}.",
    "{subject} admitted that {she} {action} my {object} {where} {when}.",
    "{when} it was my {object} that {subject} {action} {where}.",
    "without a reason {subject} {action} my {object} {where} {when}.",
    "it turned out that {subject} {action} my {object} {where} {when}.",
    "{when} we met {where}, and there {subject} {action} my {object}.",
]

# The same in two sentences, in either order
SPLIT_EVENTS = [
    ("{subject} {action} my {object}.", "it happened {where} {when}."),
    ("{when} we were both {where}.", "{subject} {action} my {object} while I looked away."),
    ("{when} {subject} {action} my {object}.", "we were {where} at that moment."),
    ("{subject} {action} my {object} {where}.", "that was {when}."),
    ("{when} I left my {object} {where} for a minute.",
     "when I came back, {subject} told me that {she} {action} it."),
    ("my {object} was {where} {when}.", "you guessed it, {subject} {action} it."),
    ("{when} I had my {object} with me {where}.", "{subject} {action} it without thinking."),
    ("{subject} came by {when}.", "before I could stop it, {she} {action} my {object} {where}."),
    ("I only wanted to show my {object} to {name} {when}.", "{she} {action} it right there {where}."),
    ("there we were {where}.", "{when} {subject} {action} my {object}, just like that."),
    ("{subject} {action} my {object}.", "{when} {where}, of all places."),
    ("it was {when}, we stood {where}.", "{subject} laughed and {action} my {object}."),
    ("my {object} means a lot to me.", "{subject} {action} it {where} {when}."),
    ("I had asked {name} to be careful with my {object}.", "{when} {she} {action} it {where} anyway."),
    ("{when} something happened {where}.", "{subject} {action} my {object}."),
    ("I can only say that {subject} {action} my {object}.", "{where}, {when}, with people around."),
]

EVENT_LEADS = ["", "", "", "", "", "anyway, ", "now to the point: ", "long story short, ",
               "here is what happened: ",
               "believe it or not, ", "to make it short, ", "get this, ", "the thing is, ", "well, ", "so ",
               "guess what, "]

FEELING_SENTENCES = [
    "I feel {feeling}.", "I am {feeling} about the whole thing.", "now I am really {feeling}.",
    "it makes me {feeling} just to think of it.", "since then I have been {feeling}.",
    "I can't help it, I feel {feeling}.",
    "to say that I am {feeling} would be putting it mildly.", "I was {feeling} then and I still am.",
    "all of this leaves me {feeling}.", "I feel so {feeling} that I can't sleep.",
    "honestly, I am {feeling}.",
    "I didn't expect to be so {feeling} about it.", "I went to bed {feeling} and woke up {feeling}.",
    "I am not going to lie, I am {feeling}.", "if you ask me how I am: {feeling}.",
    "the result is that I feel {feeling}.",
    "I try to hide it, but I am {feeling}.", "part of me laughs, but mostly I feel {feeling}.",
    "every time I see {name} I feel {feeling} again.", "I am more {feeling} than I want to admit.",
]

QUESTION_LEADS = [
    "I keep asking myself", "I honestly do not know", "my question is", "what I want to know is",
    "I can't decide",
    "I wonder", "it would help me to know", "nobody here can tell me", "I am not sure", "I have no idea",
    "the only thing I need to know is", "please tell me", "I would love to hear",
    "I lie awake and think about",
    "so what I am asking is", "the big question for me is", "I go round and round about", "help me find out",
]

CLOSERS = [
    "thanks for reading.", "thank you for any help.", "any advice is welcome.", "be honest, I can take it.",
    "sorry for the long post.", "that is all, thanks.", "I will read every comment.", "thanks in advance.",
    "what would you do?", "please help.", "I just needed to write it down.", "okay, rant over.",
    "I hope this makes sense.", "I am open to anything.", "let me hear your thoughts.",
    "thanks, it helped to type this.",
    "I will answer questions in the comments.", "feel free to call me an idiot.",
    "I am grateful for every answer.",
    "no mean comments, please.", "I look forward to your opinions.", "that's it, that's the story.",
]

EDITS = [
    "Edit: thanks for the kind words.", "Edit: I fixed some spelling.",
    "Edit: wow, I did not expect so many answers.",
    "Edit: we have not talked since.", "Edit: no, it was not insured.",
    "Edit: I am reading all of your comments.", "Edit: I will post an update soon.",
    "Edit: yes, this is real.",
]

DISTRACTOR_LEADS = ["", "", "", "", "", "by the way, ", "to be fair, ", "for context, ", "also, ",
                    "just so you know, ", "funny enough, ", "on top of that, ", "besides, ", "oh, and "]

# Other people, times, things and places, each in a role that is not the story's own. A template of ADVICE
# is one that lets the corpus ask "who says so?".
ADVICE = [
    "my {relation} {name} ({age}) says I should {advice}.", "my {relation} {name} thinks I should {advice}.",
    "my {relation} {name} ({age}) told me to {advice}.",
    "if it were up to my {relation} {name}, I would {advice}.",
    "my {relation} {name} ({age}) would {advice}.", "{name}, my {relation}, wants me to {advice}.",
    "according to my {relation} {name} ({age}) one has to {advice}.",
    "my {relation} {name} keeps telling me to {advice}.",
    "I called my {relation} {name} ({age}), and the advice was to {advice}.",
    "my {relation} {name} is sure that I have to {advice}.",
    "my {relation} {name} ({age}) begs me to {advice}.",
    "the best that my {relation} {name} could come up with was to {advice}.",
]

DISTRACTORS = [
    # somebody else's story
    "my {relation} {name} ({age}) once {action} somebody's {object} {where}, and it all ended well.",
    "years ago my {relation} {name} {action} a {object} too, but nobody made a fuss.",
    "my {relation} {name} ({age}) told me about a friend who {action} a {object} {where}.",
    "I remember how my {relation} {name} {action} an old {object} as a kid.",
    "in a film that my {relation} {name} likes, somebody {action} a {object} {where}.",
    "my {relation} {name} says that everybody has {action} a {object} at some point.",
    "my {relation} {name} ({age}) had a dream about a {object} {where}.",
    "somebody {action} a {object} of my {relation} {name} once, and they are still friends.",
    "when my {relation} {name} was little, {she} {action} a {object} every year.",
    "a friend of my {relation} {name} ({age}) {action} a {object} {when}, so it runs in the town.",
    # where the thing came from
    "it was a gift from my {relation} {name} ({age}).", "my {relation} {name} gave it to me years ago.",
    "I bought it from my {relation} {name} for very little.",
    "it once belonged to my {relation} {name} ({age}).",
    "I got it second hand from somebody {where}.", "I saved up for it by working {where} all summer.",
    "I paid for it with the money from selling an old {object}.",
    "it was nearly new, I had got it for my {object}.",
    "I won it years ago in a raffle {where}.", "my {relation} {name} ({age}) always wanted to have it.",
    # myself, another time
    "two years ago I {action} my own {object} {where} and nobody cared.",
    "I once {action} a {object} myself, so I am not perfect.",
    "as a child I {action} a {object} and paid for it.",
    "I know what it is like, I {action} some kid's {object} years ago.",
    "I am {age} myself, so I have seen a few things.", "I am {age}, in case that matters.",
    "I turned {age} not long ago and thought I was too old for this.",
    "I had to buy a {object} not long before that, so money is tight.",
    "my own {object} is old, but I take good care of it.",
    "I still have a {object} and a bed, that is all I own.",
    "the only other thing I own is a {object}.", "at least my {object} is still fine.",
    "nobody touched the {object} that stood next to it.",
    "I would not have cared if it had been the {object}.",
    # the setting
    "I work {where}, so I am hardly ever at home.", "we all met {where} for the first time, many years ago.",
    "we used to spend every summer {where}.", "our families know each other from a party {where}.",
    "I am writing this {where}, on my break.", "normally we only meet {where}.",
    "my {relation} {name} ({age}) was {where} and saw nothing.",
    "my {relation} {name} was not even there, {she} was {where}.",
    "my {relation} {name} ({age}) works {where} and hears a lot of stories like this.",
    "I ran into my {relation} {name} {where}, and we talked about it for an hour.",
    "my {relation} {name} waited for me {where} the whole time.",
    "I cried {where} where nobody could see me.",
    # other times
    "my {relation} {name} called me {when} about something else.",
    "{when} my {relation} {name} ({age}) came to visit.",
    "{when} everything was still fine between us.", "{when} we all had a nice dinner, so it is not all bad.",
    "{when} I had my birthday, and that went well.", "I last spoke to my {relation} {name} ({age}) {when}.",
    "my {relation} {name} moved house {when}, so there is nobody to talk to.",
    "{when} I started a new job {where}.",
    "{when} I was ill and could not think about anything.",
    "{when} I met an old friend {where}, which was nice.",
    # how others take it
    "my {relation} {name} ({age}) is {feeling} about it, which I find strange.",
    "my {relation} {name} says {she} would be {feeling}.",
    "I can tell that my {relation} {name} is {feeling}.",
    "my {relation} {name} ({age}) was {feeling} when {she} heard about it.",
    "my {relation} {name} only laughed.", "my {relation} {name} ({age}) does not want to be part of this.",
    "my {relation} {name} takes no side.", "I have not told my {relation} {name} ({age}) yet.",
    "people say that I should be {feeling}, but I am not.", "I used to be {feeling} a lot, but that is over.",
    "my {relation} {name} is the only one who listens to me.",
    "I showed this post to my {relation} {name} ({age}) first.",
]

# --- Summaries --------------------------------------------------------------------------------------

# A [bracket] vanishes when a slot inside it is left out. {who} is what is left of "my sister Anna (24)".
# (weight, template): the first four make up most of the references.
SUMMARY_STYLES = [
    (30, "{who} {did} {what}[ {where}][ {when}].[ I feel {feeling}.][ {question}]"),
    (20, "{who} {did} {what}[ {when}][ {where}].[ I feel {feeling}.][ {question}]"),
    (14, "[{when} ]{who} {did} {what}[ {where}].[ I feel {feeling}.][ {question}]"),
    (12, "{who} {did} {what}[ {where}][ {when}][ and I feel {feeling}].[ {question}]"),
    (5, "{who} {did} {what}[ {where}][ {when}] and now[ I feel {feeling} and] I need advice.[ {question}]"),
    (4, "[{where} ]{who} {did} {what}[ {when}].[ I feel {feeling}.][ {question}]"),
    (4, "[I feel {feeling} because ]{who} {did} {what}[ {where}][ {when}].[ {question}]"),
    (4, "{who} {did} {what}[ {where}][ {when}].[ Now I am {feeling}.][ {question}]"),
    (4, "{who} {did} {what}[ {when}].[ It was {where}.][ I feel {feeling}.][ {question}]"),
    (3, "[{when} ]{who} {did} {what}[ {where}][ and now I am {feeling}].[ {question}]"),
]

FILLERS = [
    "It is a long story.", "I do not know what to think.", "Thanks for reading.", "Please help me.",
    "I need some advice here.", "There is more to it.", "It has been a difficult time.",
    "I will read every comment.", "Nobody wants to hear about it.", "That is all I can say.",
]

# --- Pretraining corpus -----------------------------------------------------------------------------

# Stories about {owner}, told by somebody else.
THIRD_PERSON_OPENERS = [
    "here is a story that I heard from {owner}.", "this happened to {owner}, not to me.",
    "let me tell you about {owner}.", "I am writing for {owner}, who does not like to write.",
    "{owner} had a strange day.", "dear all, this is the latest news about {owner}.",
    "have you heard about {owner}?", "{owner} told me the following.",
]
THIRD_PERSON_INTRODUCTIONS = [
    "{name}, the {relation} of {owner}, is {age}.", "{owner} has a {relation} called {name} ({age}).",
    "{owner}'s {relation} {name} is {age} years old.",
    "the {relation} of {owner} is called {name} and is {age}.",
    "you may know {name} ({age}), the {relation} of {owner}.",
    "{owner} and {name} ({age}), {owner}'s {relation}, were close.",
    "it is all about {owner}'s {relation} {name}, who is {age}.",
    "{name} is {age} and the {relation} of {owner}.",
]
THIRD_PERSON_EVENTS = [
    "{when} {subject} {action} {owner}'s {object} {where}.",
    "{subject} {action} {owner}'s {object} {where} {when}.",
    "{where} {subject} {action} {owner}'s {object}, and that was {when}.",
    "{when} the two met {where}, and {subject} {action} {owner}'s {object}.",
    "what {subject} did {when} is this: {she} {action} {owner}'s {object} {where}.",
    "{subject} {action} {owner}'s {object} {when} when they were {where}.",
    "{owner} saw how {subject} {action} {owner}'s {object} {where} {when}.",
    "{owner} left the {object} {where} {when}, and {subject} {action} it.",
]
THIRD_PERSON_FEELINGS = [
    "{owner} feels {feeling}.", "{owner} is {feeling} about it.", "now {owner} is really {feeling}.",
    "since then {owner} has been {feeling}.", "it left {owner} {feeling}.", "{owner} says: I am {feeling}.",
]
THIRD_PERSON_QUESTIONS = [
    "{owner} wants to know {whether}.", "{owner} does not know {whether}.", "the question is {whether}.",
    "{owner} has to decide {whether}.", "now {owner} thinks about {whether}.", "{owner} asked me {whether}.",
]
THIRD_PERSON_ADVICE = [
    "{owner}'s {relation} {name} ({age}) says it is best to {advice}.",
    "{name}, {owner}'s {relation}, would {advice}.", "{owner}'s {relation} {name} told {owner} to {advice}.",
    "the {relation} of {owner}, {name}, wants {owner} to {advice}.",
    "if it were up to {owner}'s {relation} {name} ({age}), {owner} would {advice}.",
]
THIRD_PERSON_DISTRACTORS = [
    "{owner}'s {relation} {name} ({age}) once {action} a {object} {where}.",
    "years ago {owner} {action} a {object} too.",
    "it was a gift from {owner}'s {relation} {name} ({age}).",
    "{owner} works {where} and is hardly ever at home.",
    "{owner} is {age}, by the way.", "{owner}'s {relation} {name} was {where} and saw nothing.",
    "{when} all was still fine.",
    "{owner}'s {relation} {name} ({age}) was {feeling} when {she} heard about it.",
    "{when} {owner} had a birthday, and that went well.", "I met {owner} {where} many years ago.",
    "{owner}'s {relation} {name} takes no side.", "at least the {object} of {owner} is still fine.",
    "{owner}'s {relation} {name} ({age}) only laughed.",
    "{owner} used to be {feeling} a lot, but that is over.",
]

# A commenter retells. {who} {did} {what} as in the summaries; {your}, {you}, {feel}, {want} fit the person.
RETELLINGS = [
    ("so {who} {did} {what}[ {where}][ {when}][, and {you} {feel} {feeling}].[ {you} {want} to know "
     "{whether}.]"),
    "so[ {when}] {who} {did} {what}[ {where}].[ {you} {feel} {feeling}.][ the question is {whether}.]",
    (
        "if I read this right, {who} {did} {what}[ {when}][ {where}][, which makes {you} {feeling}]."
        "[ {you} {ask} {whether}.]"
    ),
    (
        "wait, {who} {did} {what}[ {where}]?[ and that {when}?][ no wonder {you} {feel} {feeling}.]"
        "[ and {you} {ask} {whether}?]"
    ),
    (
        "let me get this straight:[ {when}][ {where}] {who} {did} {what}.[ {you} {feel} {feeling}.]"
        "[ {you} {ask} {whether}.]"
    ),
    (
        "[{you} {feel} {feeling}, and rightly so. ]{who} {did} {what}[ {where}][ {when}]."
        "[ and now {you} {want} to know {whether}.]"
    ),
    ("[{you} {ask} {whether}. ]the reason is that {who} {did} {what}[ {where}][ {when}].[ {you} "
     "{feel} {feeling}.]"),
    (
        "it was {where} that {who} {did} {what}[ {when}][, right]?[ now {you} {feel} {feeling}.]"
        "[ {you} {want} to know {whether}.]"
    ),
    (
        "{what} is what this is about.[ it was {when}.][ it was {where}.] {who} {did} it."
        "[ {you} {feel} {feeling}.][ {you} {ask} {whether}.]"
    ),
    (
        "[{where}, ][{when}, ]{who} {did} {what}, is that right?[ and {you} {feel} {feeling}?]"
        "[ and {you} {ask} {whether}?]"
    ),
    (
        "one more time for the others: {who} {did} {what}[ {when}][, {where}]"
        "[, and {feeling} is how {you} {feel}].[ {you} {ask} {whether}.]"
    ),
    (
        "I see, {who} is the one who {did} {what}[ {where}][ {when}].[ {you} {feel} {feeling}.]"
        "[ {you} {want} to know {whether}.]"
    ),
    (
        "for those who skip the story: {who} {did} {what}[ {when}][ {where}]."
        "[ {feeling}, that is how {you} {feel}.][ {you} {ask} {whether}.]"
    ),
    "[how {feeling} {you} must be! ]{who} {did} {what}[ {where}][ {when}].[ and {you} {ask} us {whether}.]",
    (
        "then {who} {did} {what}[ {when}][ {where}], and that is why"
        "[ {you} {feel} {feeling} and] {you} wrote this.[ {you} {want} to know {whether}.]"
    ),
    (
        "okay, {what}, and it was {who} who {did} it[, {where}][, {when}].[ result: {you} {feel} {feeling}.]"
        "[ question: {whether}.]"
    ),
]
# The same as loose claims, in any order.
CLAIMS = {
    "relation": ["it was {your} {relation}", "{your} {relation} did it", "this is about {your} {relation}"],
    "name": ["the name is {name}", "the one to talk to is {name}", "it is {name} we talk about"],
    "age": ["the age is {age}", "somebody who is {age} did this", "we talk about a person of {age}"],
    "action": ["somebody {action} it", "{action} is the word", "what they did: {action} it"],
    "object": ["it was the {object}", "it is about the {object}", "all of this for a {object}"],
    "place": ["it happened {where}", "it was {where}", "the place was the {place}"],
    "when": ["it happened {when}", "that was {when}", "it was {when}"],
    "feeling": ["{you} {feel} {feeling}", "{feeling} is the feeling", "it made {you} {feeling}"],
    "question": ["{you} {want} to know {whether}", "{you} {ask} {whether}", "the question is {whether}"],
}
CLAIM_LEADS = ["so ", "as I understand it, ", "what we know: ", "in short: ", "to sum up, ", "right: ", "",
               ""]

# The author's verdict.
YES = ["Yes, exactly.", "Yes, that is right.", "Yes, you got it.", "Yes, true."]
YES_ALL = ["Yes, that is all of it.", "Yes, that is the whole story.", "Yes, you left out nothing."]
LEFT_OUT = ["Yes, but you left out {that}.", "Yes, but do not forget {that}.", "Yes, but it matters {that}.",
            "Yes, only that you left out {that}."]
LEFT_OUT_NOUNS = ["Yes, but you left out {nouns}.", "Yes, but {nouns} should be in it.",
                  "Yes, but without {nouns}."]
CORRECTIONS = {
    "relation": ["it was {my} {right}, not {my} {wrong}", "not {my} {wrong} but {my} {right}"],
    "name": ["the name is {right}, not {wrong}", "it was {right}, not {wrong}", "not {wrong} but {right}"],
    "age": ["the age is {right}, not {wrong}", "not {wrong} but {right} years old"],
    "action": ["I said {right}, not {wrong}", "not {wrong} but {right}",
               "nobody {wrong} it, somebody {right} it"],
    "object": ["it was the {right}, not the {wrong}", "it is about the {right}, not about the {wrong}"],
    "place": ["it was the {right}, not the {wrong}", "it was {right_where}, not {wrong_where}"],
    "when": ["it was {right}, not {wrong}", "that was {right}, not {wrong}"],
    "feeling": ["{I} {feel} {right}, not {wrong}", "the word is {right}, not {wrong}"],
    "question": ["the question is {right}, not {wrong}", "{I} {ask} {right}, not {wrong}"],
}
MISSING_CLAUSES = {
    "relation": "that it was {my} {relation}", "name": "that the name is {name}",
    "age": "that {name} is {age}",
    "action": "that {name} {action} it", "object": "that it was the {object}", "place": "that it was {where}",
    "when": "that it was {when}", "feeling": "that {I} {feel} {feeling}",
    "question": "that {I} {ask} {whether}",
}  # fmt: skip
SLOT_NOUNS = {
    "relation": "who it was", "name": "the name", "age": "the age", "action": "what was done",
    "object": "the thing",
    "place": "the place", "when": "the time", "feeling": "the feeling", "question": "the question",
}  # fmt: skip

# slot: questions, answers
ROLE_QUESTIONS = {
    "relation": (["who did it?", "who was it?", "who {action} it?", "who is {name}?"],
                 ["{your} {relation}.", "it was {your} {relation}."]),
    "name": (["what is {your} {relation} called?", "what is the name?", "who {action} the {object}?"],
             ["{name}."]),
    "age": (["how old is {name}?", "how old is {your} {relation}?", "what is the age of {name}?"],
            ["{age}.", "{name} is {age}."]),
    "action": (["what did {name} do to the {object}?", "what happened to the {object}?"],
               ["{name} {action} it.", "{your} {relation} {action} it."]),
    "object": (["what was it?", "which thing is it about?", "what was it that {name} {action}?"],
               ["{your} {object}.", "the {object}."]),
    "place": (["where was it?", "where did it happen?", "where were they?"], ["{where}.", "it was {where}."]),
    "when": (["when was it?", "when did it happen?", "when was that?"], ["{when}.", "it was {when}."]),
    "feeling": (["how {do} {you} feel?", "what is the feeling?"], ["{feeling}.", "{you} {feel} {feeling}."]),
    "question": (["what {do} {you} want to know?", "what is the question?"],
                 ["{whether}.", "{you} {ask} {whether}."]),
}  # fmt: skip

REACTIONS = [
    "That made me laugh.", "Wow.", "I read this twice.", "Really?", "Poor you.", "That is hard.",
    "Same here.",
    "I know this so well.", "This part is strange.", "I am sorry about that.", "Who does that?",
    "Good to know.",
]
REPLIES = [
    "I am sorry about {your} {object}. {name} is {age} and should know better. I would {tip}.",
    "{name} will not change, not at {age}. My tip is to {tip}.",
    "It is only a {object}, but I would be {feeling} too. Talk to {name} and then {tip}.",
    "Dear friend, give {name} some time. After that, {tip}.",
    "Something like this happened to me {where} too. In the end I had to {tip}.",
    "You can always buy a {object}, but {your} {relation} is one of a kind. Try to {tip}.",
    "{your} {relation} {name} owes {you} something. In such a case I {tip}.",
    "Why is nobody on the side of {name}? A {relation} can make mistakes. Best is to {tip}.",
    "What {name} did {when} was not okay. I would {tip}, and then I would have some tea.",
]
