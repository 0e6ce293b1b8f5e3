// How many discoveries arrive: the last minute as a line, the last seconds as a figure.

const SECONDS = 60;
const RECENT = 5;
const [WIDTH, HEIGHT] = [120, 28];

export class Rate {
  #counts = new Array(SECONDS).fill(0);
  #now = 0;
  #svg;
  #figure;
  #ticks = 0;

  constructor(svg, figure) {
    this.#svg = svg;
    this.#figure = figure;
    this.#draw();
    setInterval(() => this.#tick(), 1000);
  }

  count(number) {
    this.#now += number;
  }

  #tick() {
    this.#counts.push(this.#now);
    this.#counts.shift();
    this.#now = 0;
    this.#ticks += 1;
    if (document.visibilityState === "visible") this.#draw();
  }

  #draw() {
    const highest = Math.max(...this.#counts, 4);
    const points = this.#counts.map((count, second) => {
      const x = (second / (SECONDS - 1)) * WIDTH;
      return `${x.toFixed(1)} ${(HEIGHT - 1 - (count / highest) * (HEIGHT - 3)).toFixed(1)}`;
    });
    const line = `M${points.join("L")}`;
    this.#svg.querySelector(".line").setAttribute("d", line);
    this.#svg.querySelector(".area").setAttribute("d", `${line}L${WIDTH} ${HEIGHT}L0 ${HEIGHT}z`);
    const recent = this.#counts.slice(-RECENT).reduce((sum, count) => sum + count, 0) / RECENT;
    this.#figure.textContent = recent > 0 && recent < 10 ? recent.toFixed(1) : String(Math.round(recent));
    if (this.#ticks % 10 === 0) {
      const total = this.#counts.reduce((sum, count) => sum + count, 0);
      const most = Math.max(...this.#counts);
      const label = total ? `${total} discoveries in the last minute, ${most} in the busiest second` : "No discoveries in the last minute";
      this.#svg.setAttribute("aria-label", label);
    }
  }
}
