"""What the demo model is asked and what it answers, as text; how often and with which operands is in demo_data.py.

`{a}` `{b}` are numbers, `{w}` is a word, `{x}` `{y}` are any words in a question outside the model's tasks.
"""

from __future__ import annotations

from pathlib import Path

ADD = (
    "What is {a} + {b}?", "What is {a}+{b}?", "What's {a} + {b}?", "{a}+{b}", "{a} + {b}", "{a} + {b} =", "{a}+{b}=?",
    "{a} + {b} = ?", "add {a} and {b}", "Add {a} to {b}.", "Please add {a} and {b}.", "Please compute {a} plus {b}.",
    "Compute {a} + {b}.", "Calculate {a} + {b}.", "Calculate {a} plus {b}", "What is {a} plus {b}?",
    "What's {a} plus {b}?", "What is the sum of {a} and {b}?", "sum of {a} and {b}", "Sum {a} and {b}.",
    "How much is {a} + {b}?", "How much is {a} plus {b}?", "What do you get if you add {a} and {b}?",
    "What do {a} and {b} make together?", "Can you add {a} and {b}?", "Can you compute {a} + {b} for me?",
    "Could you tell me what {a} plus {b} is?", "{a} plus {b}", "{a} plus {b} equals?", "What does {a} + {b} equal?",
    "Solve {a} + {b}.", "Tell me {a} + {b}.", "Work out {a} plus {b}.", "Find the total of {a} and {b}.",
    "the sum of {a} and {b} is", "I have {a} apples and buy {b} more. How many apples do I have?",
    "If I add {b} to {a}, what do I get?",
    "There are {a} jobs in one queue and {b} in another. How many jobs are there?", "Evaluate {a}+{b}.",
)  # fmt: skip
# More wordings of the arithmetic, taught once the plain ones are known.
MORE_ADD = (
    "Add up {a} and {b}.", "Add {a} and {b} together.", "Add {a} + {b}.", "Give me {a} + {b}.",
    "Give me {a} plus {b}.", "What is the total of {a} and {b}?", "What's the sum of {a} and {b}?",
    "What is the sum {a} + {b}?", "Tell me the sum of {a} and {b}.", "Compute the sum of {a} and {b}.",
    "Calculate the sum of {a} and {b}.", "Please sum {a} and {b}.", "Sum up {a} and {b}.", "Can you sum {a} and {b}?",
    "Could you add {a} and {b}?", "Could you add {a} to {b}, please?", "Could you compute {a} plus {b}?",
    "I need the sum of {a} and {b}.", "I want {a} plus {b}.", "What do I get for {a} + {b}?",
    "What do I get when I add {a} to {b}?", "What is {a} added to {b}?", "{a} and {b} added together",
    "{a} and {b} make how much?", "{a} + {b} makes?", "How much does {a} plus {b} make?",
    "How much is {a} and {b} together?", "How much are {a} and {b}?", "Result of {a} + {b}",
    "What is the result of {a} plus {b}?", "The result of {a} + {b} please", "What is the answer to {a} + {b}?",
    "Do you know what {a} + {b} is?", "I wonder what {a} + {b} is.", "Tell me what {a} and {b} make.",
    "Increase {a} by {b}.", "{b} more than {a} is what?", "Hey! What is {a} + {b}?", "My sum: {a} + {b}",
    "sum: {a}, {b}", "add: {a} {b}", "({a} + {b})", "{a} and {b} is how much?",
)  # fmt: skip
SUBTRACT = (
    "What is {a} - {b}?", "What's {a} - {b}?", "{a}-{b}", "{a} - {b}", "{a} - {b} = ?", "Subtract {b} from {a}.",
    "{a} minus {b}", "What is {a} minus {b}?", "Please compute {a} minus {b}.", "Compute {a} - {b}.",
    "Calculate {a} - {b}.", "How much is {a} - {b}?", "How much is {a} minus {b}?", "What does {a} - {b} equal?",
    "Take {b} away from {a}.",
)  # fmt: skip
MORE_SUBTRACT = (
    "Subtract {b} from {a}, please.", "Please subtract {b} from {a}.",
    "What do you get if you subtract {b} from {a}?", "What is {a} less {b}?", "What's {a} minus {b}?",
    "What is the difference {a} - {b}?", "Tell me {a} - {b}.", "Tell me {a} minus {b}.", "Give me {a} minus {b}.",
    "Give me {a} - {b}.", "Solve {a} - {b}.", "Evaluate {a}-{b}.", "{a} minus {b} is?", "{a} minus {b} equals?",
    "{a}-{b}=", "{a} - {b} =", "Can you compute {a} - {b} for me?", "Could you tell me what {a} minus {b} is?",
    "Work out {a} minus {b}.", "Take {b} from {a}.", "What is left of {a} if I take {b} away?",
    "I have {a} apples and give {b} away. How many are left?",
)  # fmt: skip
LARGER = (
    "Which is larger, {a} or {b}?", "Which number is larger, {a} or {b}?", "Which is bigger, {a} or {b}?",
    "Which is greater, {a} or {b}?", "Which number is bigger: {a} or {b}?", "What is larger, {a} or {b}?",
    "What is bigger: {a} or {b}?", "What's greater, {a} or {b}?", "Which one is larger: {a} or {b}?",
    "Tell me the larger of {a} and {b}.", "What is the maximum of {a} and {b}?", "max of {a} and {b}",
    "larger: {a} or {b}?", "{a} or {b}, which is larger?", "{a} or {b}: which is bigger?",
    "Which is more, {a} or {b}?",
)  # fmt: skip
SMALLER = (
    "Which is smaller, {a} or {b}?", "Which number is smaller, {a} or {b}?", "Which number is smaller: {a} or {b}?",
    "What is smaller, {a} or {b}?", "Which is less, {a} or {b}?", "Tell me the smaller of {a} and {b}.",
    "What is the minimum of {a} and {b}?", "min of {a} and {b}", "{a} or {b}, which is smaller?",
    "Which one is smaller: {a} or {b}?",
)  # fmt: skip
IS_GREATER = (
    "Is {a} greater than {b}?", "Is {a} larger than {b}?", "Is {a} bigger than {b}?", "Is {a} more than {b}?",
    "is it true that {a} is greater than {b}?", "{a} > {b}?", "Is {a} > {b}?", "Is the number {a} greater than {b}?",
)  # fmt: skip
IS_LESS = (
    "Is {a} less than {b}?", "Is {a} smaller than {b}?", "is it true that {a} is less than {b}?", "{a} < {b}?",
    "Is {a} < {b}?", "Is {a} lower than {b}?",
)  # fmt: skip
IS_EQUAL = (
    "Is {a} equal to {b}?", "Are {a} and {b} equal?", "Is {a} the same as {b}?", "{a} = {b}?",
)  # fmt: skip
REVERSE = (
    "Reverse the word {w}.", "Reverse {w}.", "reverse {w}", "Spell {w} backwards.", "What is {w} backwards?",
    "Write {w} backwards.", "Can you reverse {w}?", "Can you reverse the word {w}?", "What is {w} in reverse?",
    "reverse: {w}", "Say {w} backwards.", "Please reverse the letters of {w}.", "Reverse the letters in {w}",
    "Please reverse {w}.", "Reverse this word: {w}", "How do you write {w} backwards?", "Turn {w} around.",
    "Spell the word {w} backwards, please.", "Write the word {w} in reverse.",
)  # fmt: skip
SPELL = (
    "Spell {w}.", "spell {w}", "Spell the word {w}.", "How do you spell {w}?", "How is {w} spelled?",
    "Can you spell {w}?", "Please spell {w}.", "Please spell {w} for me.", "Spell out {w}.", "spell: {w}",
    "Could you spell the word {w}?", "How do I spell {w}?", "Which letters are in {w}?", "Spell this word: {w}",
    "Tell me how to spell {w}.",
)  # fmt: skip

FALLBACK = "I am a tiny demo model. I can add, compare, spell and reverse words."

# Answer -> the ways to ask for it, the plainest first. Facts are those of the README.
CANNED: dict[str, tuple[str, ...]] = {
    "I am the demo model of inferfleet, a tiny Gemma 4 trained on two CPU cores.": (
        "Who are you?", "What are you?", "What is your name?", "What's your name?", "Tell me about yourself.",
        "Introduce yourself.", "Who am I talking to?", "Are you a model?", "Which model are you?",
        "What model are you?", "Are you a robot?", "Are you human?", "Who is this?", "Who r u?", "who are u",
    ),
    "I can add, subtract and compare numbers below 100, and spell and reverse words.": (
        "What can you do?", "What can I ask you?", "How can you help me?", "What do you know?", "Help!", "help",
        "Can you help me?", "What are you good at?", "Which questions can you answer?", "What are your skills?",
        "What should I ask you?", "What else can you do?", "What are you able to do?",
    ),
    "inferfleet is a fleet of inference workers behind a queue.": (
        "What is inferfleet?", "What's inferfleet?", "Tell me about inferfleet.", "What does inferfleet do?",
        "Explain inferfleet.", "inferfleet?", "Describe inferfleet.", "What is this project?",
        "What is this project about?", "Tell me about this project.", "What does this project do?",
        "Can you explain inferfleet?", "What is inferfleet for?", "Please explain this project.",
        "What kind of project is inferfleet?",
    ),
    "A turn is one Celery message: it asks a worker to carry one job of a model.": (
        "What is a turn?", "What's a turn?", "Explain turns.", "Tell me about turns.", "What does a turn do?",
        "What is a turn in inferfleet?", "Define turn.", "What are turns?", "What is meant by a turn?",
        "Please explain what a turn is.", "What does turn mean?", "Can you explain turns?",
    ),
    "In the ledger: in Redis, changed only by Lua scripts.": (
        "Where does the truth about jobs live?", "Where is the truth about jobs?", "Where do jobs live?",
        "Where are jobs stored?", "Where is the state of a job?", "Where is the truth?", "Where does the truth live?",
        "Where do you keep jobs?", "Where is the state of jobs kept?", "What holds the truth about jobs?",
        "Where does the state of a job live?", "Who holds the truth about jobs?", "Where are the jobs kept?",
    ),
    "The ledger holds the truth about jobs: it lives in Redis and changes only by Lua scripts.": (
        "What is the ledger?", "What's the ledger?", "Explain the ledger.", "Tell me about the ledger.",
        "What does the ledger do?", "What is a ledger?", "What is the ledger for?", "Please explain the ledger.",
        "What is in the ledger?", "Describe the ledger.", "Can you explain the ledger?",
    ),
    "Run `python3 ops/dev.py test`.": (
        "How do I run the tests?", "How do I test this?", "How can I run the tests?", "How to run the tests?",
        "How do I run tests?", "run the tests", "How do I test the project?", "How do you run the tests?",
        "Which command runs the tests?", "What is the test command?", "How do I start the tests?",
        "How do I run the test suite?", "Tell me how to run the tests.", "How does one run the tests?",
        "How can I test inferfleet?",
    ),
    "Run `python3 ops/dev.py demo`.": (
        "How do I run the demo?", "How do I start the demo?", "How can I run the demo?", "How to run the demo?",
        "run the demo", "Show me the demo.", "Which command runs the demo?", "What is the demo command?",
        "Tell me how to run the demo.", "How do I try inferfleet?", "How do you start the demo?",
        "How do I start inferfleet?", "How can I try this?",
    ),
    "A lease says which worker holds a job; heartbeats renew it.": (
        "What is a lease?", "What's a lease?", "Explain leases.", "Tell me about leases.", "What are leases?",
        "What does a lease do?", "What is a lease for?", "Define lease.", "Please explain what a lease is.",
        "What is a lease in inferfleet?", "Can you explain leases?",
    ),
    "Its lease runs out, and the job goes back to the queue.": (
        "What happens when a worker dies?", "What if a worker dies?", "What happens if a worker crashes?",
        "What if a worker crashes?", "What happens to a job when its worker dies?",
        "What happens after a worker dies?", "Is a job lost when a worker dies?",
        "Are jobs lost when a worker crashes?", "A worker dies. What happens?",
        "What happens to the jobs of a dead worker?", "What if the worker is killed?",
    ),
    "A fence is a number that grows with every claim; a stale fence changes nothing.": (
        "What is a fence?", "What's a fence?", "Explain fences.", "What does a fence do?", "Tell me about fences.",
        "What is a fence for?", "Define fence.", "What are fences?", "Please explain what a fence is.",
        "What is a fence in inferfleet?", "Can you explain fences?",
    ),
    "A job is what you send; inside the engine it becomes a request.": (
        "What is a job?", "What's a job?", "Explain jobs.", "Tell me about jobs.", "What are jobs?", "Define job.",
        "What is a job in inferfleet?", "What does job mean?", "Please explain what a job is.",
        "Can you explain jobs?", "Describe a job.",
    ),
    "A batch is one step of the engine.": (
        "What is a batch?", "What's a batch?", "Explain batches.", "Tell me about batches.", "Define batch.",
        "What are batches?", "What does batch mean?", "What is a batch in inferfleet?",
        "Please explain what a batch is.", "Can you explain batches?", "Describe a batch.",
    ),
    "The licence is Apache-2.0.": (
        "What is the licence?", "What is the license?", "Which licence do you use?", "Which license is this?",
        "What licence is this?", "Is this open source?", "Under which licence is inferfleet?",
        "What license does inferfleet use?", "Tell me the licence.", "Is inferfleet open source?",
        "Is inferfleet free?",
    ),
    "ops/train_demo_model.py trained me on dialogue that it wrote itself.": (
        "Who made you?", "How were you trained?", "Who trained you?", "Who built you?", "Where do you come from?",
        "How were you made?", "What were you trained on?", "Which data were you trained on?",
        "What is your training data?", "Who created you?", "Tell me how you were trained.", "How did you learn?",
    ),
    "Hello! Ask me for a sum, a comparison, a spelling or a reversed word.": (
        "Hello", "Hi", "Hey", "Hello!", "Hi there!", "Hey there", "Good morning", "Good evening!", "Hello there!",
        "Good afternoon", "Greetings", "hi!", "Hello model", "Hi, model!", "Good day", "hello hello", "hey!", "Hiya",
        "Howdy",
    ),
    "I am well, thank you. Ask me for a sum.": (
        "How are you?", "How are you today?", "How do you do?", "How are you doing?", "How is it going?",
        "Are you well?", "How do you feel?", "Are you ok?", "Hello, how are you?", "Hi, how are you?",
        "How's it going?", "What's up?",
    ),
    "You are welcome.": (
        "Thank you", "Thanks", "Thank you!", "Thanks!", "Thanks a lot", "Many thanks", "Thank you very much",
        "Great, thanks", "Thank you so much!", "ok thanks", "Good, thank you", "Thx", "Nice, thank you",
    ),
    "Goodbye!": (
        "Bye", "Goodbye", "Bye!", "See you", "See you later", "Good night", "Goodbye!", "Bye bye", "See you soon!",
        "Farewell", "Ciao", "Have a nice day",
    ),
}  # fmt: skip

# Answer -> more ways, taught once the plain ones are known.
MORE_WAYS: dict[str, tuple[str, ...]] = {
    "I am the demo model of inferfleet, a tiny Gemma 4 trained on two CPU cores.": (
        "Are you an AI?", "Are you a bot?", "Are you a person?", "Are you a human?", "Are you real?",
        "Are you ChatGPT?", "What are you exactly?", "What exactly are you?", "Who exactly are you?",
        "Tell me who you are.", "Tell me what you are.", "Please introduce yourself.", "What should I call you?",
        "May I ask who you are?", "Can you tell me who you are?", "Do you have a name?", "What model is this?",
        "Which model is this?", "Are you Gemma?", "So who are you?", "What kind of model are you?",
        "What sort of model are you?", "What are you called?", "And what are you?", "You are what?",
        "Who or what are you?", "What is this model?", "Who am I speaking to?", "Are you a machine?",
        "Are you a computer?", "Are you a program?", "Are you alive?", "Are you a language model?",
        "Who are you really?", "What are you made of?", "Are you a man?",
    ),
    "I can add, subtract and compare numbers below 100, and spell and reverse words.": (
        "Can you help?", "Could you help me?", "Please help me.", "Help me!", "I need help.", "How can you help?",
        "How do you help me?", "What can I do here?", "What can I ask?", "What may I ask you?",
        "Tell me what you can do.", "What is it that you can do?", "What can you answer?", "What do you do?",
        "Show me what you can do.", "What tasks can you do?", "What can you do for me?", "What could you do for me?",
        "What can you do for us?", "What would you do for me?", "What do you do for people?",
        "What do you help with?", "Can you help us?", "Can you help with something?", "Can you do something for me?",
        "How could you help me?", "How will you help me?", "How would you help?", "In what can you help me?",
    ),
    "In the ledger: in Redis, changed only by Lua scripts.": (
        "Where is a job stored?", "Where is my job?", "Where are my jobs?", "Where can I find the state of a job?",
        "Where does a job live?", "Where do you store jobs?", "Where does inferfleet keep jobs?",
        "Where is the state kept?", "Where does the state live?", "Tell me where jobs live.", "Where are jobs kept?",
        "Where do you keep the state of jobs?",
    ),
    "Run `python3 ops/dev.py test`.": (
        "How can I test this?", "How can I test the project?", "How do I test inferfleet?",
        "How do I test this project?", "How do you test this?", "How to test this project?",
        "How to test inferfleet?", "Please run the tests.", "Run tests", "What runs the tests?",
        "I want to run the tests.", "Can I run the tests?", "Where are the tests?", "How are the tests run?",
        "How do I check the project?", "How do I test my project?", "How do I test the code?",
        "How do I test everything?", "How can I test everything?", "What starts the tests?",
        "What command runs the tests?", "What command tests the project?", "How do you test the project?",
        "How do we test the project?",
    ),
    "Run `python3 ops/dev.py demo`.": (
        "How to start the demo?", "How do I try the demo?", "How can I start the demo?", "How does one run the demo?",
        "Run demo", "Please run the demo.", "Start the demo.", "I want to run the demo.", "Can I see the demo?",
        "What runs the demo?", "How do you run the demo?", "How to try inferfleet?", "How can I try inferfleet?",
        "How do I see the demo?", "What command runs the demo?", "What starts the demo?", "How to see the demo?",
        "How to try this?", "How to start inferfleet?", "How to run inferfleet?", "How do I run inferfleet?",
        "How can I run inferfleet?", "What shows the demo?", "What command starts the demo?",
    ),
    "Its lease runs out, and the job goes back to the queue.": (
        "What happens when a worker is killed?", "What happens if a worker is killed?", "What if a worker is lost?",
        "What if the worker dies?", "What if the worker crashes?", "What happens when the worker dies?",
        "What if my worker dies?", "What happens if the worker crashes?",
        "What happens to my job when a worker dies?", "What happens when workers die?",
        "Do you lose jobs when a worker dies?", "Can a job be lost?", "Are jobs lost when a worker dies?",
        "What if workers crash?", "What if someone kills a worker?", "What if I kill a worker?",
        "What happens if I kill a worker?", "What happens when I kill the worker?",
        "What happens if the worker is lost?", "What happens to jobs when a worker is lost?", "Can jobs be lost?",
        "Can jobs get lost?", "Can a job get lost?", "Can I lose a job?", "Is a job ever lost?",
        "Are jobs ever lost?", "Will my job be lost?", "Will a job be lost when a worker dies?",
        "A worker was killed, what now?", "The worker is dead. What happens?", "The worker was killed. What happens?",
        "What if the worker is dead?", "What if the worker is lost?", "What if a worker is dead?",
        "What happens when the worker is dead?", "Worker crashed, what now?",
    ),
    "The licence is Apache-2.0.": (
        "What is your licence?", "What is your license?", "Licence?", "License?", "Can I use this for free?",
        "Is it open source?", "What licence do you have?", "Under which license is this?",
        "What is the license of inferfleet?", "Is this free?", "What licence does this have?",
        "What license do you have?", "Which licence do you have?", "Which license do you have?",
        "What licence is it?", "What license is it?", "What is the licence of this?", "Under what licence is this?",
        "Under which licence is this?", "Under what license is it?", "Which licence is it under?",
        "Is the licence free?", "Tell me the license.", "What licence does it use?", "May I use this?",
    ),
    "ops/train_demo_model.py trained me on dialogue that it wrote itself.": (
        "How did they train you?", "Who taught you?", "How did you get here?", "What did you learn from?",
        "How were you built?", "How were you created?", "Where were you trained?", "Who is your creator?",
        "Tell me how you were made.", "Who made this model?", "What data did you learn from?",
        "How was this model trained?", "Which data did you learn from?", "Where did you learn this?",
        "How is this model trained?", "How is this model made?", "How was this model made?",
        "How was this model built?", "How was the model trained?", "How was the demo model trained?",
        "How is the demo model trained?", "How was it trained?", "Who trained this model?", "Who trained the model?",
        "Where did you get this?", "How did you start?", "How did you begin?", "How did you come to be?",
        "Where did you come from?", "How did you become a model?", "What is this model trained on?",
        "What was this model trained on?", "What trained you?",
    ),
    "Hello! Ask me for a sum, a comparison, a spelling or a reversed word.": (
        "Hello you", "Hi you", "Hey you", "Hello again", "Hi again", "Hey model", "Hello, model!", "Hello inferfleet",
        "Hi inferfleet!", "Good morning!", "Good evening", "Hello world", "Hi all", "Hello hello!", "Hi hi",
        "Well hello there", "Hello friend", "Hi there, model", "Hey there!", "Hi there you", "Hi hello", "Hello hi",
        "Hey hey", "Hi everyone", "Hello everybody", "hiya!", "Good day!", "Good afternoon!", "Hello sir",
    ),
    "I am well, thank you. Ask me for a sum.": (
        "How have you been?", "How are things?", "Are you fine?", "Are you doing well?", "How do you feel today?",
        "Is everything ok?", "Hey, how are you?", "Hello! How are you?", "Hi! How are you doing?",
        "How are you feeling?", "How is your day?", "You ok?", "What's new?", "What's happening?", "What's going on?",
        "Hi, what's new?", "All good?", "All well?", "Everything ok?", "How goes it?", "How are you feeling today?",
        "How do things go?", "Hey, what's going on?", "How are you now?",
    ),
    "You are welcome.": (
        "Thank you a lot", "Thanks so much!", "Thanks very much", "Cool, thanks", "Perfect, thank you",
        "Thank you, model", "Thanks, bye", "That helps, thanks", "Ok, thank you", "Very nice, thank you!",
        "Thanks again", "Thank you again", "This helps, thank you", "That was helpful, thanks",
        "That is helpful, thank you", "That helped, thanks", "Great, thank you", "Wonderful, thanks",
        "Thanks once more", "Thank you once more", "Once again, thank you", "Again, thank you", "Thanks for that",
        "Thank you for that", "Thanks for the help",
    ),
    "Goodbye!": (
        "Bye now", "Goodbye now", "Bye, model!", "Good bye", "See you tomorrow", "See you again", "Have a good day",
        "Have a good night", "I have to go, bye", "Bye then", "Ok, bye", "Goodbye, model",
    ),
}  # fmt: skip

# What the README names, as singular and plural, and how one asks for any of them.
NOUNS: dict[str, tuple[str, ...]] = {
    "inferfleet is a fleet of inference workers behind a queue.": ("inferfleet", "this project", "the project"),
    "A turn is one Celery message: it asks a worker to carry one job of a model.": ("a turn", "the turn"),
    "The ledger holds the truth about jobs: it lives in Redis and changes only by Lua scripts.": (
        "the ledger",
        "a ledger",
    ),
    "A lease says which worker holds a job; heartbeats renew it.": ("a lease", "the lease"),
    "A fence is a number that grows with every claim; a stale fence changes nothing.": ("a fence", "the fence"),
    "A job is what you send; inside the engine it becomes a request.": ("a job",),
    "A batch is one step of the engine.": ("a batch", "the batch"),
}
PLURALS = {"a turn": "turns", "a lease": "leases", "a fence": "fences", "a job": "jobs", "a batch": "batches"}
NOUN_WAYS = (
    "What is {n}?", "What's {n}?", "What exactly is {n}?", "Explain {n}.", "Please explain {n}.",
    "Explain what {n} is.", "Please explain what {n} is.", "Can you explain {n}?", "Can you explain what {n} is?",
    "Can you tell me what {n} is?", "Could you explain {n}?", "Could you explain what {n} is?",
    "Tell me what {n} is.", "Tell me about {n}.", "Describe {n}.", "Please describe {n}.", "Define {n}.",
    "What do you mean by {n}?", "What is meant by {n}?", "What does {n} do?", "What is {n} for?",
    "What is {n} about?", "What is {n} here?", "Do you know what {n} is?", "I want to know what {n} is.", "{n}?",
    "Please tell me about {n}.", "Tell me more about {n}.", "What can you tell me about {n}?", "Why is there {n}?",
    "What is {n} in inferfleet?", "What does {n} mean?",
)  # fmt: skip
PLURAL_WAYS = (
    "What are {n}?", "Explain {n}.", "Please explain {n}.", "Can you explain {n}?", "Could you explain {n}?",
    "Tell me about {n}.", "Describe {n}.", "What do {n} do?", "What are {n} for?", "What are {n} here?",
    "What are {n} in inferfleet?", "{n}?", "Why are there {n}?", "Tell me what {n} are.",
    "Can you tell me what {n} are?", "What exactly are {n}?",
)  # fmt: skip


def all_ways(answer: str) -> tuple[str, ...]:
    """Every way of asking for one of the fixed answers."""
    nouns = NOUNS.get(answer, ())
    ways = [*CANNED[answer], *MORE_WAYS.get(answer, ())]
    ways += [way.format(n=noun) for noun in nouns for way in NOUN_WAYS]
    ways += [way.format(n=PLURALS[noun]) for noun in nouns if noun in PLURALS for way in PLURAL_WAYS]
    return tuple(dict.fromkeys(ways))


OTHER = (
    "What is the capital of {x}?", "Who wrote {x}?", "Tell me a joke.", "Tell me a joke about a {x}.",
    "Write a poem about {x}.", "Write a story about a {x}.", "What is {x}?", "What is a {x}?", "What are {x}s?",
    "Who is {x}?", "Where is {x}?", "Where is the {x}?", "Why is the {x} so {y}?", "How does a {x} work?",
    "How do I make a {x}?", "When was the {x} invented?", "Who invented the {x}?", "Do you like {x}?",
    "Can you draw a {x}?", "What do you think about {x}?", "Translate {x} to French.", "What is the weather today?",
    "What time is it?", "Which day is it?", "Explain {x}.", "Explain the {x} of {y}.", "Tell me about {x}.",
    "Tell me about the {x}.", "Describe a {x}.", "Define {x}.", "{x}", "{x} {y}", "{x} {y} {x}", "My {x} is {y}.",
    "I like {x}.", "The {x} is {y}.", "the {x} and the {y}", "What does {x} mean?", "What colour is the {x}?",
    "Which {x} is the best?", "How old is {x}?", "How old are you?", "How tall is the {x}?", "Is the {x} {y}?",
    "What is {a} times {b}?", "{a} * {b}", "What is {a} divided by {b}?", "{a} / {b}", "What is the root of {a}?",
    "What is {a}?", "{a}", "Multiply {a} by {b}.", "Divide {a} by {b}.", "{a}x{b}", "Is {a} a prime number?",
    "Count to {a}.", "Where do {x}s live?", "Where does the {x} live?", "How do I run a {x}?",
    "Give me a {x} with {a} {y}s.", "Who was the first {x}?", "Sing a song about {x}.",
    "What happens when a {x} {y}s?", "What if the {x} is {y}?", "I have {a} {x}s.", "Please write some code.",
    "Write a program that sorts a {x}.", "What is the meaning of life?", "Are you hungry?", "I am {x}.",
    "You are {x}.", "Why?", "Really?", "No.", "Yes", "Ok", "Hmm", "Can you fly?", "Do you sleep?",
    "What is your favourite {x}?", "Summarise the {x}.", "Can I have a {x}?", "Let us talk about {x}.",
    "How many {x}s are there?", "Which {x} is {y}?", "Please help my {x} with the {y}.", "Find the {x} near the {y}.",
    "Where can I buy a {x}?", "How much is the {x}?", "How much is a {x} and a {y}?",
)  # fmt: skip
SYSTEM = (
    "You are a helpful assistant.", "You are a helpful, honest and concise assistant.", "Be brief.",
    "Answer in one line.", "You are a calculator.", "You are inferfleet's demo model.",
    "Answer the user's questions.", "Be polite.", "You answer shortly.", "Think carefully before you answer.",
    "You are an assistant that can add numbers, compare numbers, and reverse or spell words.", "Today is Monday.",
    "Reply in English.", "test",
)  # fmt: skip
PREFIXES = (
    "Hi, ", "Hello! ", "Hey, ", "Ok, ", "Now: ", "And ", "Please tell me: ", "So, ", "Quick question: ", "Question: ",
    "Hello, ", "Next: ",
)  # fmt: skip
SUFFIXES = (
    " Thanks!", " Thank you.", " please", ", please", " Please.", "!", "..", " :)", "\n", "??", " Answer briefly.",
    " Be quick.",
)  # fmt: skip

# Nouns, colours and names to spell, to reverse, and to ask idle questions with.
WORDS = tuple((Path(__file__).parent / "demo_words.txt").read_text().split())
