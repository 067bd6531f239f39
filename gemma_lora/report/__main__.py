"""The command line of the report."""

from gemma_lora import report
from gemma_lora.errors import Parser, UserError, run_main
from gemma_lora.files import path_argument


def main() -> None:
    parser = Parser("gemma_lora.report", report.__doc__)
    parser.add_argument("--workdir", required=True, type=path_argument)
    parser.add_argument(
        "--compare", nargs="+", default=[], type=path_argument, metavar="DIR",
        help="workdirs of other runs",
    )  # fmt: skip
    parser.add_argument("--price-per-hour", type=float, metavar="X", help="of the whole machine")
    options = parser.parse_args()
    price = options.price_per_hour
    if price is not None and not 0 <= price < float("inf"):
        raise UserError(f"--price-per-hour is {price}, expected a number that is not negative")
    loss = report.write(options.workdir, tuple(options.compare), price)["validation"]["loss"]
    print(f"validation loss: {loss['conclusion']}")


if __name__ == "__main__":
    run_main(main)
