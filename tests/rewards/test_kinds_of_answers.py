r"""What counts as the same answer, kind by kind: `gold  ===  answer` is right, `gold  =/=  answer` is not.

A box is put around an answer that has none.
"""

import pytest

from fastrl.rewards import Math

KINDS = {
    "letters are text": r"""
ABCD  ===  ABCD
ABCD  ===  \text{ABCD}
ABCD  =/=  ABDC
ABCD  =/=  CADB
ABCD  =/=  abcd
\text{dog}  =/=  \text{god}
dog  =/=  god
\text{left}  ===  left
\text{left}  =/=  \text{felt}
\text{listen}  =/=  \text{silent}
stop  =/=  \text{post}
\text{act}  =/=  \text{cat}
on  =/=  no
IX  =/=  XI
IV  ===  \text{IV}
IV  =/=  VI
\text{VII}  =/=  \text{IIV}
XL  =/=  LX
BA3  =/=  3AB
BA3  ===  \text{BA3}
3AB  =/=  BA3
\text{B2A1}  =/=  \text{A1B2}
\text{A1B2}  ===  A1B2
AB  =/=  BA
BOOK  =/=  KOOB
DBCA  =/=  ABCD
XYZ  =/=  ZYX
ab  ===  ba
xyz  ===  zyx
2ab  ===  2ba
abc  ===  cab
Bh  ===  hB
mn  =/=  m
\text{east west}  =/=  \text{eastwest}
\text{eastwest}  =/=  \text{east west}
\text{east west}  ===  \text{east  west}
\text{east west}  ===  east west
\text{no one}  =/=  \text{noone}
\text{boo}  =/=  \text{obo}
\text{even}  =/=  \text{e v e n}
\text{r\'esum\'e}  =/=  \text{resume}
Bézier  =/=  Bezier
\text{Zoë}  ===  \text{Zoe\u0308}
""",
    "words": r"""
\text{Even}  ===  \text{even}
\text{Even}  ===  even
\text{even}  ===  EVEN
\text{even}  =/=  \text{odd}
\text{True}  ===  true
\text{True}  =/=  \text{False}
Yes  ===  \text{yes}
Yes  ===  \textbf{Yes.}
Yes  =/=  \text{No}
\text{No solution}  ===  \text{no solution}
\text{No solution}  ===  no solution
\text{No solution}  =/=  \text{solution}
\text{no}  =/=  \text{no solution}
\text{prime}  =/=  \text{composite}
Monday  ===  \text{Monday}
Monday  =/=  \text{Tuesday}
\text{Undefined}  ===  \mathrm{undefined}
\text{May 5}  ===  \text{May } 5
\text{May 5}  ===  May 5
\text{May 5}  ===  \text{May}\ 5
\text{May 5}  =/=  \text{May } 6
\text{May 5}  =/=  \text{March } 5
\text{May } 5, 2010  ===  \text{May 5, 2010}
\text{June 20}  =/=  20
\{\text{dog}\}  =/=  \{\text{god}\}
\{\text{dog}, \text{cat}\}  ===  \{\text{cat}, \text{dog}\}
\{\text{dog}, \text{cat}\}  =/=  \{\text{dog}\}
\text{on}, \text{yes}  =/=  \text{no}, \text{yes}
\text{red}, \text{blue}  ===  \text{blue and red}
(\text{red}, \text{blue})  =/=  (\text{blue}, \text{red})
\text{Alice and Bob}  ===  \text{Bob and Alice}
\text{Alice}  =/=  \text{Alice, Bob}
\text{ellipse}  =/=  \text{eclipse}
\text{Navin}  =/=  \text{Nivan}
""",
    "choices": r"""
B  ===  (B)
B  ===  \text{(B)}
B  ===  \textbf{(B)}
B  ===  \mathrm{B}
B  ===  B.
B  ===  \text{B}.
B  ===  \textbf{(B)}\ 12
B  ===  \textbf{(B) }12
B  ===  \text{(B) } \frac{1}{2}
B  ===  (B)\ 12
B  ===  \mathbf{(B)}~12
B  ===  \text{Option B}
B  ===  B) 12
B  ===  b
(B)  ===  B
\text{(B)}  ===  \text{B}
\text{B}  ===  B
B  =/=  \textbf{(C)}\ 12
B  =/=  D
B  =/=  AB
B  =/=  A, B
B  =/=  B or C
B  =/=  12
B  =/=  8
12  ===  \textbf{(B)}\ 12
12  =/=  \textbf{(B)}\ 13
12  =/=  \textbf{(B)}
\frac12  ===  \textbf{(A)}\ \frac{1}{2}
\textbf{(B)}\ 12  ===  B
\textbf{(B)}\ 12  ===  \text{(B) 12}
\textbf{(B)}\ 12  =/=  \textbf{(C)}\ 12
\textbf{(B)}\ 12  =/=  \textbf{(B)}\ 13
\textbf{(B)}\ 12  =/=  C
I  ===  I
I  ===  \text{(I)}
I  =/=  \sqrt{-1}
I  =/=  i
E  ===  \text{(E)}
E  =/=  e
E  =/=  2.718281828459045
E  =/=  \exp(1)
D  =/=  500
C  =/=  100
""",
    "shapes": r"""
\angle ABC  ===  \angle CBA
\angle ABC  ===  ∠ABC
\angle ABC  =/=  \angle BAC
\angle ABC  =/=  \angle ACB
\angle A  =/=  \angle B
\angle A  =/=  \angle a
\triangle ABC  ===  \triangle ABC
\triangle ABC  ===  △ABC
\triangle ABC  =/=  \triangle ACB
\triangle ABC  =/=  \triangle BCA
ABC  =/=  \triangle ACB
\overline{AB}  ===  \overline{BA}
\overline{AB}  =/=  \overline{AC}
\overrightarrow{AB}  =/=  \overrightarrow{BA}
\vec{BA}  =/=  \vec{AB}
\vec{AB}  ===  \overrightarrow{AB}
\vec{AB}+\vec{BC}  ===  \vec{BC}+\vec{AB}
\vec{AB}+\vec{BC}  =/=  \vec{BA}+\vec{BC}
""",
    "primes and accents": r"""
f(x)  =/=  f'(x)
f'(x)  =/=  f(x)
f'(x)  ===  f^{\prime}(x)
f'(x)  ===  f′(x)
f'(x)  =/=  f''(x)
f''(x)  ===  f^{\prime\prime}(x)
f'(x)+2f(x)  ===  2f(x)+f'(x)
f'(x)+2f(x)  =/=  f(x)+2f'(x)
x'  =/=  x
A'  =/=  A
y'=2y  =/=  y=2y
\bar{x}  =/=  x
\bar{x}  ===  \overline{x}
\hat{p}  =/=  p
\hat{p}+1  ===  1+\hat{p}
\hat{p}  =/=  \bar{p}
\vec{v}  =/=  v
\tilde{x}  =/=  x
\dot{x}  =/=  \ddot{x}
2\bar{z}  ===  \bar{z}+\bar{z}
2\bar{z}  =/=  2z
a_2  =/=  a_1
a_{12}  =/=  a_{21}
x_1+x_2  ===  x_2+x_1
""",
    "case": r"""
2\pi r  =/=  2\pi R
\pi R^2  ===  R^2\pi
\pi R^2  =/=  \pi r^2
a^2B  =/=  A^2b
a^2B  ===  Ba^2
A+2a  ===  2a+A
A+2a  =/=  a+2A
x  =/=  X
X+1  =/=  x+1
\delta  =/=  \Delta
\frac{M}{m}  =/=  \frac{m}{M}
\frac{M}{m}  =/=  1
2E  =/=  2e
2E  ===  E\cdot 2
e^2  =/=  E^2
2I  =/=  2i
IR  =/=  RI
\frac{x^2}{2}+C  ===  \frac{x^2}{2}+c
\frac{x^2}{2}+C  ===  C+\frac{x^2}{2}
\frac{x^2}{2}+c  ===  \frac{1}{2}x^2+C
\sin x+C  ===  \sin x+c
\frac{x^2}{2}+C  =/=  \frac{x^2}{2}
cx+C  =/=  cx+c
""",
    "tiny and huge": r"""
\frac{1}{2004!}  =/=  \frac{1}{2006!}
\frac{1}{2004!}  ===  \frac{2005}{2005!}
\frac{1}{2^{99}}  =/=  \frac{1}{2^{98}}
\frac{1}{2^{99}}  ===  2^{-99}
e^{-50}  =/=  e^{-51}
e^{-50}  ===  \frac{1}{e^{50}}
e^{-35}  =/=  e^{-36}
e^{-20}  =/=  e^{-21}
\left(\frac{5}{6}\right)^{201}  =/=  \left(\frac{5}{6}\right)^{200}
\left(\frac56\right)^{201}  ===  \frac{5^{201}}{6^{201}}
\frac{\sqrt{3}}{10^{16}}  =/=  \frac{\sqrt{2}}{10^{16}}
\frac{12!}{10^{30}}  =/=  \frac{10!}{10^{30}}
\frac{12!}{10^{30}}  ===  \frac{132\cdot 10!}{10^{30}}
\frac{1}{3^{70}}  =/=  e^{-100}-e^{-101}
e^{-100}-e^{-101}  =/=  e^{-100}
e^{-100}-e^{-101}  ===  \frac{e-1}{e^{101}}
(1,2^{-61})  =/=  (1,2^{-60})
(1,2^{-61})  ===  (1,\frac{1}{2^{61}})
\{1,e^{-60}\}  =/=  \{1,e^{-61}\}
x=e^{-60}  =/=  x=e^{-61}
\frac{x}{2004!}  =/=  \frac{x}{2006!}
x e^{-80}  =/=  x e^{-81}
\begin{pmatrix}1\\e^{-60}\end{pmatrix}  =/=  \begin{pmatrix}1\\e^{-61}\end{pmatrix}
(0,e^{-60}]  =/=  (0,e^{-61}]
10^{-20}  =/=  10^{-21}
0  =/=  10^{-20}
e^{-60}  =/=  0
1-e^{-60}  =/=  1
10^{20}+\sqrt{3}  =/=  10^{20}+\sqrt{2}
\sqrt{2}+\sqrt{3}  =/=  \sqrt{2}+\sqrt{3}+10^{-40}
\pi  =/=  3.14159265358979
\pi  =/=  3.14159265
\pi  =/=  3.14159265358979323846264338327950288
\sqrt{2}  =/=  1.41421356237310
(\pi,1)  =/=  (3.14159265358979,1)
e  =/=  2.7183
2\pi\times10^{-15}  =/=  \pi\times 10^{-15}
\frac{1}{30000000}  =/=  0.0000000
\frac{1}{30000000}  =/=  0.00000003
2^{100}  ===  1267650600228229401496703205376
2^{100}  =/=  1267650600228229401496703205377
""",
    "scale words": r"""
2500000  ===  2.5\text{ million}
2500000  ===  2.5 million
2.5\text{ million}  ===  2{,}500{,}000
2.5\text{ million}  ===  2.5\times 10^6
2.5\text{ million}  =/=  2.5\text{ billion}
2.5\text{ million}  =/=  2.5
3  =/=  3\text{ million}
3\text{ million}  =/=  3
24  ===  2\text{ dozen}
2\text{ dozen}  ===  24
2\text{ dozen}  =/=  2\text{ pairs}
2\text{ dozen}  =/=  2
4  ===  2\text{ pairs}
3\text{ thousand}  ===  3000
3\text{ hundred}  =/=  3\text{ thousand}
300\text{ thousand}  ===  3\text{ hundred thousand}
\$3\text{ million}  ===  3000000
\$3\text{ million}  ===  3 \text{ million dollars}
\$3\text{ million}  =/=  \$3\text{ billion}
\sqrt{2}  =/=  \sqrt{2}\text{ million}
""",
    "units": r"""
2000\text{ m}  ===  2\text{ km}
2\text{ km}  ===  2000\,\mathrm{m}
5\text{ km}  ===  5
5\text{ km}  =/=  5\text{ m}
5\text{ km}  =/=  5\text{ miles}
5\text{ cm}  =/=  5\text{ apples}
1\text{ ft}  ===  12\text{ inches}
1\text{ mile}  ===  5280\text{ feet}
1\text{ kg}  ===  1000\text{ grams}
1\text{ kg}  =/=  1000\text{ m}
2\text{ pounds}  ===  32\text{ ounces}
2\text{ hours}  ===  120\text{ minutes}
2\text{ hours}  =/=  2\text{ minutes}
1\text{ day}  ===  24\text{ hours}
2\text{ weeks}  ===  14\text{ days}
1\text{ year}  ===  12\text{ months}
90\text{ minutes}  ===  1 \text{ hour } 30 \text{ minutes}
90\text{ minutes}  ===  1\text{ hour and }30\text{ minutes}
90\text{ minutes}  ===  1.5\text{ hours}
90\text{ minutes}  =/=  1\text{ hour } 20\text{ minutes}
1\text{ hour } 30\text{ minutes}  =/=  90
5\text{ feet } 6\text{ inches}  ===  66\text{ inches}
1\text{ L}  ===  1000\text{ mL}
1\text{ L}  ===  1000\text{ cm}^3
3\text{ m}^2  ===  30000\text{ cm}^2
3\text{ m}^2  =/=  300\text{ cm}^2
3\text{ m}^2  =/=  3\text{ m}^3
3\text{ m}^2  ===  3\text{ square meters}
5\text{ in}^2  =/=  5\text{ in}^3
36\text{ km/h}  ===  10\text{ m/s}
36\text{ km/h}  ===  36\text{ kilometers per hour}
60\text{ mph}  ===  60\text{ miles per hour}
60\text{ mph}  =/=  60\text{ km/h}
3\text{ m/s}^2  =/=  3\text{ m/s}
3\text{ m/s}^2  ===  3\,\mathrm{m}/\mathrm{s}^2
60^\circ  ===  60 \text{ degrees}
60^\circ  ===  60°
60^\circ  ===  60^{\circ}
60^\circ  ===  60
60  ===  60^\circ
60^\circ  =/=  60\text{ radians}
60^\circ  ===  \frac{\pi}{3}\text{ radians}
60^\circ  =/=  \frac{\pi}{4}\text{ radians}
\frac{\pi}{3}\text{ radians}  ===  60^\circ
30.5^\circ  ===  30^\circ 30'
30.5^\circ  ===  30°30′
30.5^\circ  =/=  30^\circ 5'
30^\circ15'  ===  30^\circ 15'
30^\circ15'  =/=  30^\circ 16'
30^\circ15'36''  ===  30.26^\circ
20^\circ\text{C}  =/=  20^\circ\text{F}
48  ===  48 apples
48  ===  48 \text{ square units}
48 \text{ square units}  ===  48\text{ cm}^2
48 \text{ square units}  =/=  48\text{ cm}^3
48 \text{ apples}  ===  48 \text{ red apples}
48 \text{ apples}  =/=  48 \text{ oranges}
48 \text{ apples}  =/=  47 \text{ apples}
5 cm  ===  5\,\mathrm{cm}
5 cm  ===  5cm
5 km  ===  5000\text{ meters}
5  =/=  5x
5x  =/=  5
3  ===  3 \text{ feet tall}
20\pi  ===  20\pi \text{ cm}^2
20\pi\text{ cm}^2  ===  20\pi
20\pi\text{ cm}^2  =/=  20\pi\text{ cm}^3
20\pi\text{ cm}^2  =/=  20\pi\text{ m}^2
\pi\text{ m}  ===  100\pi\text{ cm}
\sqrt{3}\text{ cm}  ===  \sqrt 3
\sqrt{3}\text{ cm}  ===  10\sqrt{3}\text{ mm}
\sqrt{3}\text{ cm}  =/=  \sqrt{3}\text{ kg}
x\text{ cm}  =/=  x\text{ km}
1\text{ cm}, 2\text{ cm}  ===  2\text{ cm}, 1\text{ cm}
1\text{ cm}, 2\text{ cm}  =/=  1\text{ m}, 2\text{ cm}
""",
    "money": r"""
15  ===  €15
15  ===  £15
15  ===  ¥15
15  ===  ₹15
15  ===  \$15
15  ===  \text{\$}15
15  ===  15\text{ dollars}
15  ===  15 USD
15  ===  \text{USD }15
15  ===  \euro 15
15  ===  US\$15
7.5  ===  £7.50
\$15  ===  15
\$15  ===  15\text{ dollars}
\$15  =/=  €15
£15  =/=  \$15
\$15  =/=  15\text{ apples}
\$0.75  ===  75\text{ cents}
\$0.75  ===  75¢
\$5  =/=  5\text{ cents}
€0.75  ===  75\text{ cents}
75\text{ cents}  ===  \$.75
75\text{ cents}  =/=  \$75
\$3.50  ===  3\text{ dollars and }50\text{ cents}
\$1,250  ===  1250.00
\$1,250  =/=  \$125
-\$5  ===  -5
\$3\sqrt{2}  ===  3\sqrt{2}
""",
    "percent": r"""
\frac{1}{4}  ===  25\%
0.25  ===  25\%
25\%  ===  \frac{1}{4}
25\%  ===  25
25\%  ===  25\text{ percent}
25\%  =/=  250\%
25\%  =/=  2.5
12.5\%  ===  12.5
12.5\%  ===  0.125
12.5\%  =/=  1.25
18  ===  18\%
33\frac{1}{3}  ===  33\frac{1}{3}\%
33\frac13\%  ===  \frac{100}{3}\%
0.5  =/=  0.5\%
\frac12  =/=  \frac12\%
1  =/=  1\%
1  ===  100\%
0.75  =/=  0.75\%
\sqrt{2}  =/=  \sqrt{2}\%
\sqrt{2}\%  ===  \sqrt{2}
\frac{\sqrt{2}}{2}  ===  50\sqrt{2}\%
5\%  =/=  5\text{ cm}^2\%
""",
    "thousands": r"""
1000000  ===  1\ 000\ 000
1000000  ===  1 000 000
1000000  ===  1,000,000
1000000  ===  1{,}000{,}000
1000000  ===  1\,000\,000
1000000  ===  1~000~000
1000000  ===  1 000 000
12,345  ===  12 345
12,345  ===  12345
12345  ===  12 345
12345  ===  12 345
12345  ===  12{,}345
12345.5  ===  12 345.5
12 345  ===  12345
12345  =/=  12 346
1234  =/=  12,34
1234  =/=  1,2,3,4
1234  =/=  1 23 4
42  =/=  4 2
1, 234  =/=  1,234
1,234  =/=  1, 234
1,234, 5,678  ===  5678, 1234
(1,234)  =/=  1234
""",
    "numbers": r"""
\frac{7}{2}  ===  3\frac{1}{2}
\frac{7}{2}  ===  3 1/2
\frac{7}{2}  ===  3\ 1/2
\frac{7}{2}  ===  {7 \over 2}
\frac{7}{2}  ===  7 \over 2
\frac{7}{2}  ===  3½
\frac{7}{2}  ===  \dfrac72
\frac{7}{2}  ===  3.5
3 1/2  ===  3.5
11/2  =/=  1 1/2
31/2  =/=  3 1/2
-\frac{7}{2}  ===  -3\frac12
-\frac12  =/=  -1\frac12
\frac{\sqrt{3}}{2}  ===  {\sqrt{3} \over 2}
\frac{1}{2}  ===  ½
\frac{3}{4}  ===  \nicefrac{3}{4}
\frac{3}{4}  ===  \sfrac{3}{4}
\frac{3}{4}  =/=  ¾x
\frac{-1}{2}  ===  -\frac{1}{2}
-\frac12  ===  \frac{1}{-2}
0.1  ===  \frac 1{10}
\frac13  ===  0.\overline{3}
\frac13  ===  0.\bar{3}
\frac13  ===  0.\dot{3}
\frac13  ===  0.\dot3
\frac13  ===  0.333333
\frac13  =/=  0.33
\frac13  =/=  0.3
\frac13  =/=  0.333334
\frac16  ===  0.1\overline{6}
\frac16  =/=  0.\overline{16}
\frac17  ===  0.\overline{142857}
\frac17  ===  0.\dot{1}4285\dot{7}
\frac17  =/=  0.\dot{1}4258\dot{7}
0.\overline{3}  ===  \frac{1}{3}
0.\overline{3}  =/=  0.3
0.\overline{9}  ===  1
1.\overline{27}  ===  \frac{14}{11}
-5  ===  −5
5  ===  +5
0  ===  -0
2.5  ===  2.50
1500  ===  1.5e3
1500  ===  1.5×10^3
1500  ===  1.5 × 10³
1500  ===  1.5 \cdot 10^{3}
1.5\times 10^{3}  =/=  1.5\times10^{4}
3.14  ===  \approx 3.14
3.14  ===  x \approx 3.14
3.14  ===  x\approx3.14
3.14  =/=  \approx 3.15
\frac{22}{7}  ===  \frac{22}{7} \approx 3.14
5  ===  x=5
5  ===  5=x
x=5  ===  5
x=5  ===  5=x
x=5  =/=  y=5
5  =/=  6=x
123  =/=  321
\frac32  =/=  1+\frac{1}{2}
10  =/=  \binom{5}{2}
3  =/=  |-3|
4  =/=  \sqrt{16}
""",
    "unicode": r"""
2\sqrt{3}  ===  2√3
\sqrt{x+1}  ===  √(x+1)
\sqrt[3]{2}  ===  ∛2
2\sqrt{3}  =/=  2√2
2\pi  ===  2π
2\pi r  ===  2πr
x^2  ===  x²
x^{-1}  ===  x⁻¹
x_1+x_2  ===  x₁+x₂
\theta  ===  θ
\infty  ===  ∞
x\le 5  ===  x ≤ 5
x\ge 5  =/=  x ≤ 5
\pm 3  ===  ±3
2\cdot x  ===  2·x
\emptyset  ===  ∅
(-\infty,0)\cup(1,\infty)  ===  (−∞,0)∪(1,∞)
42  =/=  ４２
42  =/=  ٤٢
42  =/=  4​2
x  =/=  х
\frac{1}{2}  ===  1⁄2
""",
    "bases": r"""
1011_{2}  ===  1011_2
1011_2  ===  (1011)_2
1011_2  ===  (1011)_{2}
1011_2  ===  1011_{\text{two}}
1011_2  ===  1011
1011_2  ===  1011₂
1011_2  =/=  1011_3
1011_2  =/=  1101_2
1011_2  =/=  11
1011_2  =/=  11_{10}
2A_{16}  ===  2\text{A}_{16}
2A_{16}  ===  2A_{16}
2A_{16}  ===  2a_{16}
2A_{16}  =/=  A2_{16}
2A_{16}  =/=  42
\text{FEEB}_{16}  =/=  \text{BEEF}_{16}
\text{BEEF}_{16}  ===  BEEF_{16}
45  ===  45_{10}
45_{10}  ===  45
45  =/=  45_8
45_8  =/=  45_{10}
52_8  ===  52
a_2  =/=  a_{10}
""",
    "intervals": r"""
(0,1]  ===  ]0,1]
[0,1)  ===  [0,1[
(0,1)  ===  ]0,1[
(0,1)  ===  ]0;1[
(0,1]  =/=  ]0,1[
(0,1]  =/=  [0,1]
(0,1]  ===  x\in]0,1]
(0,1)\cup(2,3)  ===  ]0,1[\cup]2,3[
(-\infty,-2)\cup(2,\infty)  ===  x<-2 \text{ or } x>2
(-\infty,-2)\cup(2,\infty)  ===  x>2 \text{ or } x<-2
(-\infty,-2)\cup(2,\infty)  ===  x<-2 or x>2
(-\infty,-2)\cup(2,\infty)  =/=  x\le-2 \text{ or } x>2
(-\infty,-2)\cup(2,\infty)  =/=  -2<x<2
(-\infty,-2)\cup(2,\infty)  ===  (2,\infty)\cup(-\infty,-2)
x<-2 \text{ or } x>2  ===  (-\infty,-2)\cup(2,\infty)
x<-2 \text{ or } x>2  =/=  x<-2 \text{ and } x>3
[1,3]  ===  1\le x\le 3
[1,3]  ===  x\ge 1 \text{ and } x\le 3
[1,3]  =/=  1<x\le 3
[1,3]  ===  x\in[1,3]
[1,3]  =/=  (1,3)
[1,3]  =/=  \{1,3\}
[5,\infty)  ===  [5,+\infty)
[5,\infty)  ===  x\ge 5
[5,\infty)  =/=  x>5
(-\infty,\sqrt{2})  ===  x<\sqrt{2}
(-\infty,\sqrt{2})  =/=  x<\sqrt{3}
0<x<12.5  ===  (0,12.5)
x\le2  ===  (-\infty,2]
x\ge 2  ===  x\geqslant 2
x<5  =/=  x\le 5
x<5  =/=  y<5
x<5  ===  5>x
b>a  ===  a<b
b>a  =/=  a>b
(-\infty,1)\cup(1,\infty)  ===  x\ne 1
(-\infty,1)\cup(1,\infty)  =/=  (-\infty,\infty)
(-\infty,\infty)  ===  \mathbb{R}
(-2,1)\cup(3,4)  =/=  [-2,1]\cup[3,4]
[-1,2)  ===  \{x \mid -1\le x<2\}
""",
    "sets and lists": r"""
\{1,2,3\}  ===  \{3,1,2\}
\{1,2,3\}  ===  1,2,3
\{1,2,3\}  =/=  \{1,2\}
\{1,2\}  ===  \left\{1,2\right\}
\{1,2\}  ===  \lbrace 2,1\rbrace
\emptyset  ===  \varnothing
\emptyset  ===  \{\}
\emptyset  =/=  \{0\}
\emptyset  =/=  0
\{(1,3),(3,1)\}  ===  \{(3,1),(1,3)\}
(1,3),(3,1)  ===  (3,1),(1,3)
(1,3),(3,1)  =/=  (1,3)
2,-3  ===  x=2 \text{ or } x=-3
2,-3  ===  -3 or 2
1,4  ===  1 \text{ and } 4
1,2,4  ===  1; 2; 4
1,2,4  =/=  1; 2
(1,2)  ===  x=1, y=2
1,5  ===  x_1=1, x_2=5
-2, \frac12  ===  0.5, -2
16,3,1,1  ===  1,16,3,1
16,3,1,1  =/=  16,3,1
\pm 3  ===  3,-3
\pm 3  =/=  3
2+\sqrt{3}, 2-\sqrt{3}  ===  2\pm\sqrt{3}
\pm\sqrt{5}  ===  x=\pm\sqrt{5}
(1,2)  =/=  (2,1)
(1,2,3)  ===  \langle 1,2,3\rangle
(1,2,3)  ===  ⟨1,2,3⟩
(1,2,3)  =/=  \langle 1,3,2\rangle
(1,2)  ===  (x,y)=(1,2)
(3, \pi/2)  ===  \left(3,\frac{\pi}{2}\right)
1331\text{ and }1728  ===  1728, 1331
1331\text{ and }1728  =/=  1331, 1728, 2197
n=2,3,4  =/=  n=1,2,3
n=2,3,4  ===  2,3,4
""",
    "ratios, times, residues": r"""
3:4  ===  3:4
3:4  ===  6:8
3:4  ===  3 : 4
3:4  ===  3\text{ to }4
3:4  =/=  4:3
3:4  =/=  3:5
1:2:3  ===  2:4:6
1:2:3  ===  \frac12:1:\frac32
1:2:3  =/=  1:4:9
1:2:3  =/=  3:2:1
1:2:3  =/=  1:2
10:50  =/=  10:05
2:03  =/=  2:30
2:30  ===  2:30
4:40 \text{ a.m.}  ===  4{:}40 \text{ a.m.}
4:40 \text{ a.m.}  ===  4:40\text{ AM}
4:40 \text{ a.m.}  ===  4:40
4:40 \text{ a.m.}  =/=  4:40\text{ p.m.}
4:40 \text{ a.m.}  =/=  4:04\text{ a.m.}
3 \pmod{7}  ===  x\equiv 3\pmod 7
3 \pmod{7}  ===  3 \pmod 7
3 \pmod{7}  ===  x \equiv 10 \pmod{7}
3 \pmod{7}  ===  3
3 \pmod{7}  =/=  x\equiv 4\pmod 7
3 \pmod{7}  =/=  x\equiv 3\pmod 8
x\equiv 3\pmod 7  ===  3 \pmod{7}
x\equiv 3\pmod 7  ===  x ≡ 3 (mod 7)
""",
    "expressions": r"""
i  ===  e^{i\pi/2}
i  =/=  e^{i\pi/3}
-1  =/=  e^{i\pi}
4i+3  ===  3+4i
3+4i  =/=  3-4i
1-\frac{1}{e}  ===  1-\mathrm{e}^{-1}
1-\frac{1}{\mathrm{e}}  =/=  1+\frac{1}{\mathrm{e}}
\frac{\mathrm{e}}{2}  ===  \frac{e}{2}
1-\cos^2 x  ===  \sin^2 x
\sin 2x  ===  2\sin x\cos x
\sin 2x  =/=  2\sin x
\sin^{-1}x  =/=  \frac{1}{\sin x}
2\ln 2  ===  \ln 4
2\sqrt{3}  ===  \sqrt{12}
2\sqrt{3}  =/=  \sqrt{13}
|1-x|  ===  |x-1|
|x|  =/=  x
x^2-3x+2  ===  (x-1)(x-2)
x^2-3x+2  =/=  (x-1)(x+2)
y=2x+1  ===  2x-y+1=0
y=2x+1  =/=  2x-y-1=0
2x+2y=2  ===  x+y=1
x+y=1  =/=  x-y=1
x^2+1  ===  f(x)=x^2+1
f(x)=x^2-3x+2  ===  x^2-3x+2
\binom{n}{k}  ===  {n \choose k}
2x  ===  2*x
2x  ===  x+x
2x  ===  \sqrt[3]{8}x
\frac{x}{2}  ===  0.5x
\frac{x}{3}  =/=  0.333333333x
a+b+c  =/=  a+b
\frac{n(n+1)}{2}  ===  \sum_{k=1}^n k
4  =/=  4\sqrt(2)
\begin{pmatrix}1&2\\3&4\end{pmatrix}  ===  \begin{bmatrix}1&2\\ 3&4\end{bmatrix}
\begin{pmatrix}1&2\\3&4\end{pmatrix}  =/=  \begin{pmatrix}1&3\\2&4\end{pmatrix}
\begin{pmatrix}1&2\\3&4\end{pmatrix}  ===  \frac12\begin{pmatrix}2&4\\6&8\end{pmatrix}
\begin{pmatrix}1&2\\3&4\end{pmatrix}  =/=  \begin{vmatrix}1&2\\3&4\end{vmatrix}
""",
    "decorations": r"""
42  ===  \color{red}{42}
42  ===  {\color{red}42}
42  ===  \textcolor{blue}{42}
42  ===  \mathbf{42}
42  ===  \boldsymbol{42}
42  ===  \underline{42}
42  ===  \text{Answer: } 42
42  ===  \text{The answer is } 42
42  ===  \displaystyle 42
42  ===  42\,\;
42  ===  42.
42  ===  $42$
42  ===  \(42\)
42  ===  \[42\]
42  =/=  \color{red}{43}
42  =/=  \text{Answer: } 43
42  =/=  \text{not } 42
42  =/=  \text{about }42\text{ or }43
\frac{1}{2}  ===  \(\frac12\)
\frac{1}{2}  ===  \displaystyle\frac{1}{2}
\frac12  ===  \textcolor{red}{\frac{1}{2}}
\[42\]  ===  42
\(x^2\)  ===  x^2
$\frac{1}{2}$  ===  \frac12
$\boxed{42}$  ===  42
$\boxed{42}$  =/=  43
$$x^2$$  ===  x^2
""",
    "boxes": r"""
1,2  ===  $x=\boxed{1}$ or $x=\boxed{2}$
1,2  ===  $x=\boxed{2}$ and $x=\boxed{1}$
1,2  ===  \boxed{1}, \boxed{2}
1,2,3  ===  \boxed{1}, \boxed{2} and \boxed{3}
1,2  ===  \[\boxed{1} \quad\text{and}\quad \boxed{2}\]
1,2  =/=  \boxed{1} or \boxed{3}
1,2  =/=  First \boxed{1}. Now the second one: \boxed{2}
1, 234  ===  \boxed{1} and \boxed{234}
1234  =/=  \boxed{1}, \boxed{234}
2  =/=  \boxed{1} or \boxed{2}
2  =/=  \boxed{2} or \boxed{1}
2  =/=  \boxed{1}, \boxed{2}, \boxed{3}
2  ===  \boxed{1} is wrong, so \boxed{2}
2  ===  \boxed{2}, \boxed{2}
1  =/=  \boxed{1}. Or maybe \boxed{2}
(1,3),(3,1)  ===  $\boxed{(1,3)}$ and $\boxed{(3,1)}$
42  =/=  \boxed{42} and again \boxed{}
""",
}


def rows(table: str) -> list[tuple[str, str, bool]]:
    """-> gold, completion, whether it is right."""
    found = []
    for line in table.strip("\n").split("\n"):
        same = "  ===  " in line
        gold, answer = line.replace(r"\u0308", "\u0308").split("  ===  " if same else "  =/=  ")
        # gold boxes are part of the gold
        found.append((gold, answer if "\\boxed" in answer else f"so \\boxed{{{answer}}}", same))
    return found


@pytest.fixture(scope="module")
def verifier():
    with Math(workers=2) as verifier:
        yield verifier


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_answer_is_right_and_every_other_one_is_not(verifier, kind):
    cases = rows(KINDS[kind])
    grades = verifier.grade([text for _, text, _ in cases], [gold for gold, _, _ in cases])
    differ = [(*case, grade.status) for case, grade in zip(cases, grades, strict=True) if bool(grade.reward) != case[2]]
    assert differ == []


@pytest.mark.parametrize("kind", KINDS)
def test_golds_of_every_kind_accept_themselves(verifier, kind):
    golds = list(dict.fromkeys(gold for gold, _, _ in rows(KINDS[kind])))
    refused = [
        (gold, grade.status)
        for gold, grade in zip(golds, verifier.check_golds(golds), strict=True)
        if not grade.reward
    ]
    assert refused == []
