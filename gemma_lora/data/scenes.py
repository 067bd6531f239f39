"""The words of the generated problems: scenes, and the step templates that they share."""

# A family is: its scenes (column names first), openings, events, endings. A step is a sentence of
# the question, then '| variable=expression: sentence of the answer' for each computation, where @
# is the annotated result and x the running quantity. {word} looks a word up; {c=2-9} draws c;
# {d/2-9} draws a divisor of x; {g+2-9} draws a number that much above x. Every number is at least
# 2, so that plurals are always right.
FAMILIES = [
    """
item | crate | makes | loses
cookie | tray | bakes | drops {c=2-9} cookies on the floor and throws them away
muffin | tray | bakes | gives {c=2-9} muffins to {his} neighbors
apple | basket | picks | feeds {c=5-20} bruised apples to the pigs
egg | carton | collects | uses {c=3-12} eggs to make omelets
sticker | pack | buys | uses {c=5-25} stickers to decorate a scrapbook
pencil | box | orders | hands out {c=6-25} pencils to an art class
tomato | crate | picks | uses {c=5-20} tomatoes to make soup
seashell | bucket | finds | throws {c=3-15} broken seashells back into the sea
rose | bunch | cuts | puts {c=3-12} roses in a vase for {his} grandmother
candle | box | makes | uses {c=2-10} candles at a dinner party
bracelet | bag | makes | mails {c=3-12} bracelets to a cousin
used book | box | unpacks | donates {c=3-15} used books to the library
lemon | bag | buys | squeezes {c=4-15} lemons to make lemonade
pumpkin | wagon | harvests | carves {c=3-12} pumpkins for the fall fair
---
{A} {makes} {a=3-9} {crates} of {items}, with {b=6-15} {items} per {crate}.
| x=a*b: {A} {makes} @ {items}.
{A} {makes} {a=8-30} {items} on {day} and {k=2-4} as many the next day.
| y=a*k: The next day, {A} {makes} @ {items}. | x=a+y: Over both days, {he} {makes} @ {items}.
{A} {makes} {a=6-24} {items} every day for {b=3-8} days.
| x=a*b: {A} {makes} @ {items}.
{A} {makes} {a=12-40} {items} in the morning and {b=4-11} fewer in the afternoon.
| y=a-b: In the afternoon, {A} {makes} @ {items}. | x=a+y: {He} {makes} @ {items} that day.
---
{He} {loses}.
| x=x-c: That leaves {him} with @ {items}.
{He} gives {F/2-5} of {his} {items} to {B}.
| y=x/F: {B} gets @ {items}. | x=x-y: {A} still has @ {items}.
{He} gives {e=3-20} {items} to {C}.
| x=x-e: After the gift to {C}, {A} has @ {items}.
{D} brings {him} {e=5-30} more {items}.
| x=x+e: With the ones from {D}, {A} has @ {items}.
---
How many {items} does {A} have {now}?
{He} packs {all} {items} into boxes of {d/3-12}. How many boxes does {A} fill?
| x=x/d: {He} fills @ boxes.
{He} sells {all} {items} for ${p=2-6} each. How much money does {A} make?
| x=x*p: {He} makes $@.
{He} sells {all} {items} in bags of {d/3-8} for ${p=4-12} a bag. How much money does {A} make?
| y=x/d: {He} has @ bags to sell. | x=y*p: The bags bring in $@.
{He} shares {all} {items} equally among {d/3-9} friends. How many {items} does each friend get?
| x=x/d: Each friend gets @ {items}.
""",
    """
unit | does | role
lawn | mows | gardener
dog | walks | pet sitter
car | washes | garage helper
fence | paints | house painter
piano lesson | teaches | music teacher
bike | repairs | bike mechanic
tour | leads | museum guide
---
{A} earns ${p=8-25} for every {unit} {he} {does}. This week, {he} {does} {a=4-14} {units}.
| x=a*p: {A} earns $@.
{A} earns ${p=9-24} an hour as a {role}. {He} works {a=3-8} hours a day for {b=3-6} days.
| y=a*b: {A} works @ hours. | x=y*p: {He} earns $@.
{A} {does} {a=3-9} {units} on Saturday and {b=2-9} on Sunday, and earns ${p=6-20} for each {unit}.
| y=a+b: {A} {does} @ {units}. | x=y*p: {He} earns $@.
---
{He} also gets ${c=5-30} in tips.
| x=x+c: With the tips, {he} has $@.
{He} spends ${c=6-40} on {thing}.
| x=x-c: After paying for {thing}, {he} has $@.
{He} buys {b=2-5} {goods} for ${q=4-15} each.
| y=b*q: The {goods} cost $@. | x=x-y: {He} has $@ left.
{He} pays {F/2-5} of {his} money in rent.
| y=x/F: The rent is $@. | x=x-y: That leaves {him} with $@.
{He} donates {r=10,20,25,30}% of {his} money to an animal shelter.
| y=x*r/100: {He} donates $@. | x=x-y: After the donation, {he} has $@.
---
How much money does {A} have {now}?
{He} wants to buy a {gadget} that costs ${g+10-95}. How much more money does {A} need?
| x=g-x: {He} needs $@ more.
{He} spends {all} money on concert tickets that cost ${d/6-20} each. How many tickets does {A} buy?
| x=x/d: {He} buys @ tickets.
If every week goes the same way, how much money will {A} have after {w=3-8} weeks?
| x=x*w: After {w} weeks, {he} will have $@.
""",
    """
goes | speed | leg | more
drives | {a=40-65} | {a=60-180} | {c=15-60}
rides {his} bike | {a=8-15} | {a=12-40} | {c=4-15}
hikes | {a=2-4} | {a=5-12} | {c=2-5}
sails | {a=5-9} | {a=15-40} | {c=5-20}
paddles a canoe | {a=3-5} | {a=6-14} | {c=2-6}
---
{A} {goes} at a steady {speed} miles per hour for {b=2-6} hours.
| x=a*b: {A} covers @ miles.
{A} {goes} {leg} miles on {day} and {k=2-3} as far the next day.
| y=a*k: The next day, {A} covers @ miles. | x=a+y: Over both days, {he} covers @ miles.
{A} {goes} {leg} miles a day for {b=3-7} days.
| x=a*b: {A} covers @ miles.
---
After a long rest, {he} {goes} another {more} miles.
| x=x+c: With the extra miles, {he} covers @ miles.
The following week, {he} travels {e=2-9} miles more than that.
| y=x+e: The following week, {he} travels @ miles. | x=x+y: In all, {he} travels @ miles.
---
How many miles does {A} travel in all?
{His} goal is to travel {g+5-60} miles. How many more miles does {A} need to travel?
| x=g-x: {He} needs to travel @ more miles.
{B} covers the same total distance in {d/2-6} equal stages. How many miles long is each stage?
| x=x/d: Each stage is @ miles long.
{C} gives ${p=2-5} to charity for each of these miles. How much money does {C} give?
| x=x*p: {C} gives $@.
If {he} travels that far every month, how many miles does {A} travel in {w=3-9} months?
| x=x*w: In {w} months, {he} travels @ miles.
""",
    """
does | doing
practices the piano | practicing the piano
reads | reading
studies Spanish | studying Spanish
trains for a race | training for the race
works in the garden | working in the garden
rehearses for the school play | rehearsing
---
{A} {does} for {a=10-40} minutes every morning and {b=10-45} minutes every evening for {d=3-9} days.
| y=a+b: {A} spends @ minutes a day {doing}. | x=y*d: In {d} days, that makes @ minutes.
{A} {does} for {a=15-50} minutes on {day} and {k=2-3} as long the next day.
| y=a*k: The next day, {A} spends @ minutes. | x=a+y: Over both days, {he} spends @ minutes.
{A} {does} for {a=20-60} minutes a day, {b=2-6} days a week, for {d=2-4} weeks.
| y=b*d: {A} does this on @ days. | x=y*a: That makes @ minutes.
---
{He} also spends {c=10-55} minutes {doing} with {C}.
| x=x+c: With the time spent with {C}, that makes @ minutes.
On the last day, {he} stops {c=3-9} minutes early.
| x=x-c: Stopping early brings this down to @ minutes.
---
How many minutes does {A} spend {doing} in all?
How many hours does {A} spend {doing} in all?
| x=x/60: That is @ hours.
{His} goal is {g+10-90} minutes. How many more minutes does {A} need?
| x=g-x: {He} needs @ more minutes.
{B} spends {k=2-3} as much time {doing}. How many minutes do {A} and {B} spend in all?
| y=x*k: {B} spends @ minutes. | x=x+y: Together, they spend @ minutes.
""",
    """
place | team | person
school | class | student
summer camp | cabin | camper
soccer club | team | player
singing festival | choir | singer
dance studio | group | dancer
---
A {place} has {a=4-12} {teams} with {b=11-28} {persons} in each {team}.
| x=a*b: There are @ {persons}.
A {place} has {a=3-6} {teams} of {b=8-15} {persons} and {c=2-5} {teams} of {d=16-24} {persons}.
| y=a*b: The smaller {teams} have @ {persons}. | z=c*d: The larger {teams} have @ {persons}.
| x=y+z: There are @ {persons} in all.
---
During the day, {c=4-20} {persons} feel sick and go home.
| x=x-c: That leaves @ {persons}.
Later, {e=4-25} new {persons} join.
| x=x+e: With the new {persons}, there are @.
Because of a storm, {F/2-5} of the {persons} leave early.
| y=x/F: Because of the storm, @ {persons} leave. | x=x-y: After that, @ {persons} are still there.
---
How many {persons} are there {now}?
{All} {persons} ride in vans that hold {d/6-15} people each. How many vans are needed?
| x=x/d: They need @ vans.
Lunch costs ${p=3-9} per person. How much does lunch cost for {all} {persons}?
| x=x*p: Lunch costs $@.
{All} {persons} get {p=2-4} bottles of water each, from cases of {d/6-12}. How many cases is that?
| y=x*p: The {persons} need @ bottles. | x=y/d: That is @ cases.
""",
    """
game | gets | low | high | p | q
basketball tournament | makes | jump shot | long shot | 2 | 3
quiz show | answers | easy question | hard question | {p=2-5} | {q=10-25}
video game | collects | coin | diamond | {p=2-9} | {q=20-50}
spelling contest | spells | short word | long word | {p=2-4} | {q=5-9}
treasure hunt | solves | riddle | puzzle | {p=5-9} | {q=10-20}
---
In a {game}, {A} {gets} {a=3-14} {lows} worth {p} points each and {b=2-9} {highs} worth {q} each.
| y=a*p: The {lows} are worth @ points. | z=b*q: The {highs} are worth @ points.
| x=y+z: {A} has @ points.
---
{He} loses {c=2-9} points to a penalty.
| x=x-c: The penalty leaves {him} with @ points.
{He} gets a bonus of {e=5-30} points.
| x=x+e: The bonus brings {him} to @ points.
---
How many points does {A} have at the end?
The record is {g+4-60} points. How many more points does {A} need to tie the record?
| x=g-x: {He} needs @ more points.
The {game} has {d/2-6} rounds. How many points does {A} score per round, on average?
| x=x/d: {He} scores @ points per round.
{B} finishes with {e=3-15} fewer points than {A}. How many points do they have together?
| y=x-e: {B} has @ points. | x=x+y: Together, they have @ points.
""",
    """
item | keep
stamp | album
postcard | album
toy car | box
marble | jar
button | jar
old coin | drawer
trading card | binder
---
{A} has {a=6-30} {items}. {B} has {k=2-4} as many as {A}, and {C} has {c=3-9} fewer than {B}.
| y=a*k: {B} has @ {items}. | z=y-c: {C} has @ {items}. | x=a+y+z: Together, they have @ {items}.
{A} has {a=12-40} {items}, and {B} has {c=3-18} more than {A}.
| y=a+c: {B} has @ {items}. | x=a+y: Together, they have @ {items}.
---
They find {e=3-20} more {items} in the attic.
| x=x+e: With the ones from the attic, they have @ {items}.
They give {e=3-15} {items} to a friend.
| x=x-e: After the gift to the friend, they have @ {items}.
---
How many {items} do they have {now}?
They sort {all} {items} into {keeps} that hold {d/4-15} each. How many {keeps} do they fill?
| x=x/d: They fill @ {keeps}.
They sell {all} {items} for ${p=2-6} each. How much money do they make?
| x=x*p: They make $@.
""",
    """
item | other
notebook | pen
T-shirt | cap
sandwich | salad
puzzle | kite
paintbrush | canvas
cup | plate
---
{A} buys {a=2-9} {items} for ${p=2-15} each and {b=2-9} {others} for ${q=2-15} each.
| y=a*p: The {items} cost $@. | z=b*q: The {others} cost $@. | x=y+z: That is $@ in all.
{A} buys {a=2-5} {items} for each of {his} {b=3-9} cousins. Each {item} costs ${p=3-12}.
| y=a*b: {A} buys @ {items}. | x=y*p: The {items} cost $@.
---
{He} has a coupon for ${c=3-15} off.
| x=x-c: With the coupon, the price is $@.
The store takes {r=10,20,25,50}% off the price.
| y=x*r/100: The discount is $@. | x=x-y: That lowers the price to $@.
Delivery costs another ${e=4-12}.
| x=x+e: With delivery, the price is $@.
---
How much does {A} pay in all?
{He} started the day with ${g+5-60}. How much money does {A} have left after paying?
| x=g-x: {He} has $@ left.
{A} and {his} friends split the cost equally among {d/2-6} people. How much does each person pay?
| x=x/d: Each person pays $@.
If {he} pays that much every month, how much does {A} pay in {w=3-8} months?
| x=x*w: In {w} months, {he} pays $@.
""",
]
