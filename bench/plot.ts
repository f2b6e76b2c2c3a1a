import { BarChart, CustomChart, type CustomSeriesOption, LineChart, ScatterChart } from "echarts/charts";
import { GridComponent, LegendComponent, TitleComponent } from "echarts/components";
import { init, use } from "echarts/core";
import { SVGRenderer } from "echarts/renderers";
import type { Spread } from "./compare.ts";

use([
  BarChart,
  CustomChart,
  LineChart,
  ScatterChart,
  GridComponent,
  LegendComponent,
  TitleComponent,
  SVGRenderer,
]);

export interface BarPlot {
  readonly title: string;
  readonly subtitle: string;
  /** Of the value axis, which is logarithmic. */
  readonly unit: string;
  readonly categories: readonly string[];
  /** A bar per category: the median, with min and max as a whisker, and what is written above it. */
  readonly series: readonly {
    readonly name: string;
    readonly values: readonly Spread[];
    readonly labels: readonly string[];
  }[];
}

const COLORS = ["#4c6a92", "#c9a227", "#b5493b"];

export interface PointPlot {
  readonly title: string;
  readonly subtitle: string;
  readonly x: { readonly name: string; readonly log?: boolean };
  readonly y: { readonly name: string; readonly max?: number };
  /** Joined by a line, or a dot each. */
  readonly series: readonly {
    readonly name: string;
    readonly line: boolean;
    readonly points: readonly (readonly [x: number, y: number])[];
  }[];
}

/** The plot as the text of an SVG file. */
export function pointPlot({ title, subtitle, x, y, series }: PointPlot): string {
  const chart = init(null, null, { renderer: "svg", ssr: true, width: 900, height: 480 });
  const axis = { nameLocation: "middle" as const, nameGap: 36 };
  try {
    chart.setOption({
      animation: false,
      backgroundColor: "#ffffff",
      color: ["#222222", ...COLORS, "#5b8c5a", "#8a5a9e", "#7f7f7f", "#d08a5a"],
      title: { text: title, subtext: subtitle, left: 16, top: 10 },
      legend: {
        top: 62,
        left: 60,
        itemGap: 10,
        textStyle: { fontSize: 11 },
        data: series.map((s) => s.name),
      },
      grid: { left: 72, right: 24, top: 100, bottom: 56 },
      xAxis: { ...axis, type: x.log ? "log" : "value", name: x.name },
      yAxis: { ...axis, nameGap: 48, type: "value", min: 0, ...(y.max && { max: y.max }), name: y.name },
      series: series.map(({ name, line, points }) =>
        line
          ? { type: "line", name, showSymbol: false, data: points.map((p) => [...p]) }
          : { type: "scatter", name, symbolSize: 9, data: points.map((p) => [...p]) },
      ),
    });
    return chart.renderToSVGString();
  } finally {
    chart.dispose();
  }
}

/** The plot as the text of an SVG file. */
export function barPlot({ title, subtitle, unit, categories, series }: BarPlot): string {
  const chart = init(null, null, { renderer: "svg", ssr: true, width: 900, height: 480 });
  try {
    chart.setOption({
      animation: false,
      backgroundColor: "#ffffff",
      color: COLORS,
      title: { text: title, subtext: subtitle, left: 16, top: 10 },
      legend: { top: 20, right: 40, itemGap: 32, data: series.map((s) => s.name) },
      grid: { left: 64, right: 24, top: 90, bottom: 40 },
      xAxis: {
        type: "category",
        data: [...categories],
        axisLabel: { fontSize: 13, interval: 0, width: 180, overflow: "break" },
      },
      // One round that was disturbed must not flatten the rest.
      yAxis: { type: "log", min: 1, name: unit, nameLocation: "middle", nameGap: 40 },
      series: series.flatMap((s, i) => [
        {
          type: "bar",
          name: s.name,
          barGap: "20%",
          data: s.values.map((v) => v.median),
        },
        whiskers(s, i, series.length),
      ]),
    });
    return chart.renderToSVGString();
  } finally {
    chart.dispose();
  }
}

/** Min to max in front of each bar, and the label above. */
function whiskers(s: BarPlot["series"][number], at: number, of: number): CustomSeriesOption {
  return {
    type: "custom",
    name: s.name,
    z: 3,
    data: s.values.map((v, i) => [i, v.min, v.max]),
    encode: { x: 0, y: [1, 2] },
    renderItem: (_, api) => {
      const layout = api.barLayout!({ count: of, barGap: "20%" })![at]!;
      const [x, low] = api.coord([api.value(0), api.value(1)]) as [number, number];
      const [, high] = api.coord([api.value(0), api.value(2)]) as [number, number];
      const center = x + layout.offsetCenter!;
      const line = (x1: number, y1: number, x2: number, y2: number) => ({
        type: "line" as const,
        shape: { x1, y1, x2, y2 },
        style: { stroke: "#222", lineWidth: 1.2 },
      });
      return {
        type: "group",
        children: [
          line(center, low, center, high),
          line(center - 5, low, center + 5, low),
          line(center - 5, high, center + 5, high),
          {
            type: "text",
            style: {
              text: s.labels[Number(api.value(0))]!,
              x: center,
              y: high - 6,
              align: "center",
              verticalAlign: "bottom",
              fontSize: 12,
              fill: "#222",
            },
          },
        ],
      };
    },
  };
}
