// Draws a key's usage. The figures come with the page; the table below the chart has the same ones.

const canvas = document.getElementById("chart");
const legend = document.getElementById("legend");
// The page writes its figures in English.
const whole = new Intl.NumberFormat("en");
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
const dollars = (value) =>
  new Intl.NumberFormat("en", { style: "currency", currency: "USD", maximumFractionDigits: value !== 0 && Math.abs(value) < 0.1 ? 6 : 2 }).format(value);

const less = (all, part) => all.map((value, index) => value - part[index]);
let data = null;
let views = null;

function read() {
  data = JSON.parse(document.getElementById("chart-data").textContent);
  views = {
    requests: [
      { name: "answered", colour: "fresh", values: less(data.requests, data.errors) },
      { name: "failed", colour: "error", values: data.errors },
    ],
    cost: [{ name: "cost", colour: "fresh", values: data.cost, format: dollars }],
    tokens: [
      { name: "fresh input", colour: "fresh", values: data.fresh_input },
      { name: "cache read", colour: "read", values: data.cache_read },
      { name: "cache write", colour: "write", values: data.cache_write },
      { name: "output", colour: "output", values: data.output },
      { name: "reasoning", colour: "reasoning", values: data.reasoning },
    ],
    errors: [{ name: "failed", colour: "error", values: data.errors }],
  };
}

let shown = "requests";
let chart = null;

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--chart-${name}`).trim();

function notes(index) {
  const lines = [];
  if (data.unpriced[index] > 0) lines.push(`${whole.format(data.unpriced[index])} unpriced`);
  if (data.estimated[index] > 0) lines.push(`${whole.format(data.estimated[index])} estimated`);
  return lines;
}

function draw() {
  const rows = views[shown].filter((row) => views[shown].length === 1 || row.values.some((value) => value !== 0));
  const format = rows[0]?.format;
  const text = colour("text");
  const grid = colour("grid");
  chart?.destroy();
  chart = new Chart(canvas, {
    type: "bar",
    data: {
      labels: data.labels,
      datasets: rows.map((row) => ({
        label: row.name,
        data: row.values,
        backgroundColor: colour(row.colour),
        hoverBackgroundColor: colour(row.colour), // Chart.js would darken it, and takes what it cannot read for black
        borderRadius: 2,
        borderSkipped: false,
        maxBarThickness: 28,
        categoryPercentage: 0.86,
        barPercentage: 0.92,
      })),
    },
    options: {
      animation: false,
      maintainAspectRatio: false,
      interaction: { mode: "index", intersect: false },
      plugins: {
        legend: { display: false },
        tooltip: {
          backgroundColor: colour("output"),
          titleColor: colour("grid"),
          bodyColor: colour("grid"),
          footerColor: colour("grid"),
          footerFont: { weight: "normal" },
          padding: 10,
          boxPadding: 4,
          callbacks: {
            title: (items) => data.titles[items[0].dataIndex],
            label: (item) => ` ${item.dataset.label}: ${format ? format(item.raw) : whole.format(item.raw)}`,
            footer: (items) => notes(items[0].dataIndex),
          },
        },
      },
      scales: {
        x: {
          stacked: true,
          grid: { display: false },
          border: { color: grid },
          ticks: { color: text, maxRotation: 0, autoSkipPadding: 16, font: { size: 11 } },
        },
        y: {
          stacked: true,
          beginAtZero: true,
          grid: { color: grid },
          border: { display: false },
          ticks: {
            color: text,
            maxTicksLimit: 5,
            font: { size: 11 },
            precision: format ? undefined : 0,
            callback: (value) => (format ? format(value) : compact.format(value).replace("K", "k")),
          },
        },
      },
    },
  });
  legend.replaceChildren(
    ...rows.map((row) => {
      const item = document.createElement("li");
      const dot = document.createElement("span");
      item.className = "flex items-center gap-1.5";
      dot.className = `dot chart-${row.colour}`;
      item.append(dot, row.name);
      return item;
    }),
  );
  for (const button of document.querySelectorAll("[data-chart]")) {
    button.setAttribute("aria-pressed", String(button.dataset.chart === shown));
  }
  canvas.dataset.drawn = shown;
}

for (const button of document.querySelectorAll("[data-chart]")) {
  button.addEventListener("click", () => {
    shown = button.dataset.chart;
    draw();
  });
}
document.addEventListener("themechange", draw);
document.addEventListener("figureschange", () => {
  read();
  draw();
});
Chart.defaults.font.family = getComputedStyle(document.body).fontFamily;
read();
draw();
