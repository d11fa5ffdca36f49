"""The texts over which a quantised model is compared with the full one: several languages, code, numbers. No torch."""

from __future__ import annotations

from pathlib import Path

from inferfleet.engine.errors import InvalidRequest

#: Of a file with other prompts.
MAX_PROMPTS = 512
MAX_PROMPT_LENGTH = 4000
MAX_FILE_BYTES = 2 << 20

PROMPTS = (
    "The harbour was quiet before sunrise, and only one lamp burned at the end of the pier.",
    "Water boils at a lower temperature on a mountain, because the air presses less on its surface there.",
    "A bill becomes law when both chambers have passed it and nobody with a veto has used it in time.",
    "She asked whether the train still stopped at the old mill; the guard laughed and shook his head.",
    "To repot a plant, loosen its roots, set it no deeper than before, and water it until the pot drips.",
    "Bees tell each other where flowers are by a dance whose angle stands for the sun's direction.",
    "Dear Ms Okafor, thank you for your letter of 3 March. We are glad to confirm the appointment.",
    "Question: Which planet has the shortest year?\nAnswer: Mercury, which needs about 88 days.",
    "Der Fluss war über die Ufer getreten, und im Keller des Rathauses stand das Wasser knietief.",
    "Wer ein Fahrrad mietet, sollte vor der ersten Fahrt die Bremsen und das Licht prüfen.",
    "La boulangère ouvrait sa porte à six heures, et toute la rue sentait déjà le pain chaud.",
    "Pour calculer l'aire d'un triangle, on multiplie la base par la hauteur et on divise par deux.",
    "El tren de las ocho llegó con retraso porque un árbol había caído sobre la vía.",
    "Las abejas almacenan la miel en celdas de cera de seis lados, que ahorran espacio y material.",
    "Il vecchio ponte fu costruito in pietra e porta ancora i segni dell'ultima piena.",
    "A biblioteca abre às nove horas, mas a sala de leitura só abre depois do almoço.",
    "De kinderen bouwden een dam in de beek, maar na de regen was er niets meer van over.",
    "Zimą jezioro zamarza tak mocno, że rybacy stawiają na lodzie małe domki.",
    "Kış gelmeden önce çatıyı onardılar ve bacayı temizlediler.",
    "Зимой дни короткие, и фонари в деревне зажигают уже в четыре часа.",
    "Το καράβι έφυγε το πρωί και γύρισε πριν δύσει ο ήλιος.",
    "في الصباح يفتح البائع دكانه ويرتب الفواكه أمام الباب.",
    "הספרייה נפתחת בתשע בבוקר ונסגרת בשמונה בערב.",
    "गाँव के बाहर एक पुराना कुआँ है, जिसका पानी गर्मियों में भी नहीं सूखता।",
    "春天来了,河边的柳树发芽了,孩子们在草地上放风筝。",
    "水在零度结冰,在一百度沸腾,但在高山上沸点会降低。",
    "駅前の小さな本屋は、雨の日になると立ち読みの客でいっぱいになる。",
    "할머니는 해마다 가을이면 마당에서 고추를 말리셨다.",
    "Vào buổi sáng, chợ nổi đông nhất là lúc mặt trời vừa mọc.",
    "def mean(items: list[float]) -> float:\n    if not items:\n        return 0.0\n    return sum(items) / len(items)",
    "for (let i = 0; i < rows.length; i++) {\n  if (rows[i].done) continue;\n  queue.push(rows[i].id);\n}",
    "SELECT city, COUNT(*) AS visits FROM journeys WHERE year = 2019 GROUP BY city ORDER BY visits DESC;",
    "int count(const char *text) {\n    int n = 0;\n    while (*text) n += *text++ == ' ';\n    return n;\n}",
    '{"name": "kettle", "price": 24.90, "tags": ["kitchen", "steel"], "stock": {"north": 3, "south": 0}}',
    "3 + 4 = 7, 12 * 12 = 144, 1000 / 8 = 125, 2 ** 10 = 1024, 17 * 23 = 391, 81 / 9 = 9",
    "1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610, 987",
    "| month | rain (mm) |\n|---|---|\n| May | 61.5 |\n| June | 48.2 |\n| July | 39.0 |",
    "A tank holds 240 litres and loses 1.5 litres an hour. After 16 hours it holds 240 - 24 = 216 litres.",
    "f(x) = x^2 - 4x + 3 has its roots where (x - 1)(x - 3) = 0, so at x = 1 and x = 3.",
    "2021-03-04 12:30:07 WARN disk /dev/sdb1 is 91 % full; 2021-03-04 12:31:07 INFO removed 214 old files",
)


def read_prompts(path: Path | None) -> tuple[str, ...]:
    """The file's lines that are not empty, or the set that comes along. InvalidRequest for a file that is not so."""
    if path is None:
        return PROMPTS
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InvalidRequest(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB", param="prompts")
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path} is not a readable UTF-8 file of prompts: {error}", param="prompts") from error
    prompts = tuple(line for line in lines if line.strip())
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise InvalidRequest(
            f"{path} holds {len(prompts)} prompts, one a line; 1 to {MAX_PROMPTS} are taken", param="prompts"
        )
    for number, line in enumerate(lines, 1):
        if len(line) > MAX_PROMPT_LENGTH:
            raise InvalidRequest(
                f"line {number} of {path} is longer than {MAX_PROMPT_LENGTH} characters", param="prompts"
            )
    return prompts
