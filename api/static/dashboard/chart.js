// Lines over time, drawn by uPlot on a canvas. The text beside each chart says the same to those who do not see it.

import { html, useEffect, useRef } from "./html.js";

const HEIGHT = 168;

const colour = (element, name) => getComputedStyle(element).getPropertyValue(name).trim();

function optionsFor(box, series, format) {
  const axis = { stroke: colour(box, "--soft"), font: "11px system-ui, sans-serif", ticks: { show: false }, grid: { stroke: colour(box, "--line"), width: 1 } };
  return {
    width: box.clientWidth,
    height: HEIGHT,
    legend: { show: false },
    cursor: { y: false, points: { size: 6 }, drag: { setScale: false } },
    padding: [8, 8, 0, 0],
    scales: { y: { range: (_, low, high) => [0, Math.max(4, high * 1.15)] } },
    axes: [
      { ...axis, grid: { show: false }, size: 26, space: 70, incrs: [60, 120, 300], values: (_, times) => times.map((time) => new Date(time * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", hourCycle: "h23" })) },
      { ...axis, size: 44, space: 36, values: (_, values) => values.map((value) => (Number.isInteger(value) ? format(value) : "")) },
    ],
    series: [
      {},
      ...series.map(({ name, tone }) => ({ label: name, stroke: colour(box, tone), width: 2, fill: `${colour(box, tone)}1a`, points: { show: false } })),
    ],
  };
}

// `series`: [{name, tone, of}], where `of` takes its value from a sample and `tone` names a custom property with a
// hex colour.
export function Chart({ title, samples, series, format }) {
  const box = useRef(null);
  const plot = useRef(null);
  const data = [samples.map((sample) => sample.at), ...series.map(({ of }) => samples.map(of))];
  useEffect(() => {
    const place = box.current; // the reference is gone when observers are told of the removal
    const build = () => {
      const shown = plot.current?.data ?? data;
      plot.current?.destroy();
      plot.current = new window.uPlot(optionsFor(place, series, format), shown, place);
    };
    build();
    const resized = new ResizeObserver(() => plot.current?.setSize({ width: place.clientWidth, height: HEIGHT }));
    resized.observe(place);
    const themed = new MutationObserver(build);
    themed.observe(document.documentElement, { attributeFilter: ["data-theme"] });
    return () => {
      resized.disconnect();
      themed.disconnect();
      plot.current.destroy();
      plot.current = null;
    };
  }, []);
  useEffect(() => plot.current?.setData(data), [samples]);
  const last = samples[samples.length - 1];
  return html`
    <figure class="chart">
      <figcaption>
        <h2>${title}</h2>
        <div class="legend">${series.map(({ name, tone, of }) => html`<span key=${name}><i style=${{ background: `var(${tone})` }} aria-hidden="true"></i>${name} <b>${last ? format(of(last)) : "–"}</b></span>`)}</div>
      </figcaption>
      <div ref=${box} aria-hidden="true"></div>
    </figure>
  `;
}
